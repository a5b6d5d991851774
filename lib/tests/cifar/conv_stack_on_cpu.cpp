// The kernels of conv_stack.cu as functions of a library, with the threads as fibres on the CPU.
#include "conv_stack.cu"

extern "C" {
long shared_bytes(int backward) { return backward ? sizeof(Shared) : offsetof(Shared, x); }
long kept_floats() { return 4 * KEPT; }
void stack_forward_on_cpu(const Stack* q, int blocks) { fibres::launch(blocks, sizeof(Shared), [=] { stack_forward(*q); }); }
void stack_evaluate_on_cpu(const Stack* q, int blocks) { fibres::launch(blocks, sizeof(Shared), [=] { stack_evaluate(*q); }); }
void stack_backward_on_cpu(const Stack* q, int blocks) { fibres::launch(blocks, sizeof(Shared), [=] { stack_backward(*q); }); }
void stack_update_on_cpu(const Update* q) { fibres::launch(UPDATE_BLOCKS, 8 * WEIGHTS, [=] { stack_update(*q); }); }
void stack_prepare_on_cpu(const Update* q) { fibres::launch(UPDATE_BLOCKS, 8 * WEIGHTS, [=] { stack_prepare(*q); }); }
}
