"""Writes finished runs that were not trained, with given networks and logs."""

import torch

from lib.cifar import records, states, training
from lib.cifar.network import ConvResNet


def write_state(folder, config, network, **changes):
    """Write the state that training leaves after the last epoch, with a given network and changes of its last line."""
    folder.mkdir(parents=True)
    line = {"train_loss": 1.0, "train_accuracy": 50.0, "test_loss": None, "test_accuracy": None, "seconds": 2.0}
    line |= {"von_neumann_conv1": None, "von_neumann_conv2": None, "device": "cpu", "engine": "pytorch", "threads": 1}
    log = [dict(line, epoch=epoch, learning_rate=0.1) for epoch in range(config.epochs)]
    log[-1] |= {"test_loss": 1.5, "test_accuracy": 40.0, "von_neumann_conv1": 0.5, "von_neumann_conv2": 2.0} | changes
    state = {"format": 1, "config": vars(config), "epoch": config.epochs, "network": network.state_dict()}
    state |= {"optimizer": {}, "generator": torch.zeros(1), "log": log, "versions": training.versions()}
    torch.save(state, folder / states.STATE_FILE)


def finish(tmp_path, config, network=None, **changes):
    folder = tmp_path / "states" / config.name
    write_state(folder, config, network or ConvResNet(config.network), **changes)
    records.export(config, folder)
    return records.publish(config, folder, tmp_path)
