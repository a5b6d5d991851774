// The compiled engine's Python module; lib/engine/build.py builds and loads it.
#include <torch/extension.h>

void bind_conv_stack(pybind11::module_& m);
void bind_dense_stack(pybind11::module_& m);

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
    bind_conv_stack(m);
    bind_dense_stack(m);
}
