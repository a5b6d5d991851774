"""The explorers, the only part of `lib` that knows widgets.

explorer        what all explorers share: controls, buttons, a picture, Save
controls        sliders, menus and fields
live            runs that advance by themselves
frames          pictures that are updated several times a second
depth           networks of growing depth, trained live (by depth_training)
weights         trained networks, entry by entry
blocks          residual blocks of several depths, trained live
figure          the explorer at the end of each figure's notebook
"""
