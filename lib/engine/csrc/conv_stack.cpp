// The convolutional residual layers as functions of tensors: memory, layouts, running statistics. lib/engine/build.py
// has checked shapes and types.
#include <torch/extension.h>

#if __has_include(<sys/mman.h>)
#include <sys/mman.h>
#endif

#include <array>
#include <mutex>
#include <utility>
#include <vector>

#include "conv_stack.h"

namespace conv {
namespace {

using Tensors = std::vector<at::Tensor>;

// Memory for what the forward pass keeps. These are hundreds of megabytes, and to have the system map them afresh in
// every step would cost a good part of it: the last block that was freed is kept for the next step. Large pages, where
// the system has them, save looking up the small ones.
class Recycled {
    static inline std::mutex mutex;
    static inline void* spare = nullptr;
    static inline int64_t spare_bytes = 0;

  public:
    static at::Tensor floats(at::IntArrayRef shape) {
        std::lock_guard<std::mutex> guard(mutex);
        int64_t bytes = (c10::multiply_integers(shape) * int64_t(sizeof(float)) + 63) / 64 * 64;
        if (spare_bytes < bytes) release();
        void* data = std::exchange(spare, nullptr);
        if (data)
            bytes = std::exchange(spare_bytes, 0);
        else
            data = allocate(bytes);
        if (!data) throw OutOfMemory(bytes);
        const auto give_back = [bytes](void* block) {
            std::lock_guard<std::mutex> guard(mutex);
            if (bytes <= spare_bytes) return std::free(block);
            release();
            spare = block;
            spare_bytes = bytes;
        };
        return at::from_blob(data, shape, give_back, at::kFloat);
    }

  private:
    static void* allocate(int64_t bytes) {
        constexpr int64_t PAGE = 2 << 20;
        bytes = (bytes + PAGE - 1) / PAGE * PAGE;
        void* data = std::aligned_alloc(PAGE, bytes);
#ifdef MADV_HUGEPAGE
        if (data) madvise(data, bytes, MADV_HUGEPAGE);  // advice: nothing is lost where it is not taken
#endif
        return data;
    }

    static void release() {
        std::free(std::exchange(spare, nullptr));
        spare_bytes = 0;
    }
};

// In the order conv1.weight, conv1.bias, conv2.weight, conv2.bias and, with batch norm, bn1.weight, bn1.bias,
// bn2.weight, bn2.bias; with group norm, gn1.weight and so on in their place.
Parameters pointers(const Tensors& contiguous) {
    std::array<const float*, 8> data{};
    for (size_t j = 0; j < contiguous.size(); j++) data[j] = contiguous[j].const_data_ptr<float>();
    return {data[0], data[1], data[2], data[3], data[4], data[5], data[6], data[7]};
}

Tensors contiguous(const Tensors& tensors) {
    Tensors result;
    for (const at::Tensor& tensor : tensors) result.push_back(tensor.contiguous());
    return result;
}

Problem problem(const at::Tensor& h, int64_t depth, bool batch_norm, bool training, double eps, int64_t activation, int64_t groups,
                bool keep) {
    Problem q{depth, h.size(0), {h.size(2), h.size(3)}, batch_norm, training, groups, keep, activation, eps, 1};
    q.threads = int(std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), q.blocks())));
    return q;
}

// x, z1 and z2 of all layers (or of one), as the forward pass keeps them.
std::array<float*, 3> parts(const at::Tensor& kept) {
    float* data = kept.data_ptr<float>();
    return {data, data + kept.stride(0), kept.size(0) == 3 ? data + 2 * kept.stride(0) : nullptr};
}

// h: (n, C, H, W); running: bn1.running_mean, bn1.running_var, bn2.running_mean, bn2.running_var, updated in training.
// Returns h_L, and with `keep` two tensors for backward().
Tensors forward_tensors(const at::Tensor& h, const Tensors& parameters, const Tensors& running, bool training, double momentum,
                        double eps, int64_t activation, int64_t groups, bool keep) {
    const at::NoGradGuard no_grad;
    const bool batch_norm = !running.empty();
    const int64_t depth = parameters[0].size(0), n = h.size(0), height = h.size(2), width = h.size(3);
    const Problem q = problem(h, depth, batch_norm, training, eps, activation, groups, keep);
    const at::Tensor statistics = at::empty({batch_norm ? depth : 0, 4, C});
    if (batch_norm && !training)
        for (int j = 0; j < 4; j++) statistics.select(1, j).copy_(running[j]);
    const at::Tensor kept = Recycled::floats({q.has_norm() ? 3 : 2, keep ? depth : 1, n, height, width, C});
    kept[0][0].copy_(h.permute({0, 2, 3, 1}));
    const at::Tensor out = at::empty({n, height, width, C});
    const auto [x, z1, z2] = parts(kept);
    const Tensors own = contiguous(parameters);
    forward(q, pointers(own), reinterpret_cast<Statistics*>(statistics.data_ptr<float>()), x, z1, z2, out.data_ptr<float>());
    if (batch_norm && training) {
        const double count = double(n) * height * width, unbiased = count / (count - 1);
        for (int j = 0; j < 4; j++)  // as in PyTorch, the running variance is of the unbiased ones
            running[j].mul_(1 - momentum).add_(statistics.select(1, j), momentum * (j % 2 ? unbiased : 1.0));
    }
    const at::Tensor result = out.permute({0, 3, 1, 2});
    return keep ? Tensors{result, statistics, kept} : Tensors{result};
}

// Gradients with respect to h and the parameters, in the order of forward_tensors.
Tensors backward_tensors(const at::Tensor& gradient, const Tensors& parameters, const at::Tensor& statistics, const at::Tensor& kept,
                         bool training, double eps, int64_t activation, int64_t groups) {
    const at::NoGradGuard no_grad;
    const int64_t depth = parameters[0].size(0);
    const bool batch_norm = statistics.size(0) > 0;
    const Problem q = problem(gradient, depth, batch_norm, training, eps, activation, groups, true);
    const at::Tensor g = gradient.permute({0, 2, 3, 1}).clone(at::MemoryFormat::Contiguous);
    Tensors result{g.permute({0, 3, 1, 2})};
    std::array<float*, 8> out{};
    for (size_t j = 0; j < parameters.size(); j++) {
        result.push_back(j == 0 || j == 2 ? at::empty({depth, C, C, 3, 3}) : at::empty({depth, C}));
        out[j] = result.back().data_ptr<float>();
    }
    const auto [x, z1, z2] = parts(kept);
    const Tensors own = contiguous(parameters);
    backward(q, pointers(own), reinterpret_cast<const Statistics*>(statistics.data_ptr<float>()), x, z1, z2, g.data_ptr<float>(),
             {out[0], out[1], out[2], out[3], out[4], out[5], out[6], out[7]});
    return result;
}

}  // namespace
}  // namespace conv

void bind_conv_stack(pybind11::module_& m) {
    using no_gil = pybind11::call_guard<pybind11::gil_scoped_release>;
    m.attr("CONV_CHANNELS") = conv::C;
    m.def("conv_stack_forward", &conv::forward_tensors, no_gil());
    m.def("conv_stack_backward", &conv::backward_tensors, no_gil());
}
