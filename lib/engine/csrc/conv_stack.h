// The residual layers of the convolutional network, forward and backward:
//
//     h_{k+1} = h_k + (1/L) bn2(conv2(s(bn1(conv1(h_k))))),   k = 0..L-1,   conv 3x3 with bias, padding 1,
//
// with bn1 and bn2 absent in the variant without batch norm, or group norms in their place. What makes it faster than a library call for each
// operation: a pixel's channels fill a vector (layout: image, row, column, channel), an image stays in the cache
// while convolution, batch norm, activation and residual work on it, and a convolution takes 61 products of channels
// where its definition has 225 (conv_image.h). Names: x = h_k, z1 = conv1(x),
// u = bn1(z1), a = s(u), z2 = conv2(a); dx is the gradient of the loss with respect to x, and so on.
//
// Threads share the images. Sums over images add first inside an image or a block of images, whose size does not
// depend on the number of threads, then over them in order: any number of threads gives the same bits.
#pragma once

#include <omp.h>

#include "conv_image.h"

namespace conv {

constexpr int IMAGES_A_BLOCK = 4;

struct Problem {
    int64_t depth, images;
    Size size;
    bool batch_norm, training;  // training: normalise by the batch's own statistics
    int64_t groups;             // of a group norm in the place of the batch norm; 0 if there is none
    bool keep;                  // keep x, z1 and z2 of all layers for the backward pass
    int64_t activation;
    double eps;
    int threads;
    bool has_norm() const { return batch_norm || groups > 0; }
    int64_t blocks() const { return (images + IMAGES_A_BLOCK - 1) / IMAGES_A_BLOCK; }
};

// Parameters or their gradients in PyTorch's layout, stacked over the layers: weights (L, C out, C in, 9 taps), vectors
// (L, C). Without a norm the last four are null.
template <class Value>
struct Stacked {
    Value *weight1, *bias1, *weight2, *bias2, *gamma1, *beta1, *gamma2, *beta2;
};
using Parameters = Stacked<const float>;
using Gradients = Stacked<float>;

// Mean and variance that the two batch norms of one layer divide by.
struct alignas(64) Statistics {
    float mean1[C], variance1[C], mean2[C], variance2[C];
};

inline Norm first_norm(const Parameters& parameters, const Statistics& found, int64_t k, double eps) {
    return Norm(found.mean1, found.variance1, parameters.gamma1 + k * C, parameters.beta1 + k * C, eps);
}

inline Norm second_norm(const Parameters& parameters, const Statistics& found, int64_t k, double eps) {
    return Norm(found.mean2, found.variance2, parameters.gamma2 + k * C, parameters.beta2 + k * C, eps);
}

inline Norm first_group_norm(const Problem& q, const Parameters& parameters, int64_t k, const float* z1) {
    return group_norm(z1, q.size, q.groups, parameters.gamma1 + k * C, parameters.beta1 + k * C, q.eps);
}

inline Norm second_group_norm(const Problem& q, const Parameters& parameters, int64_t k, const float* z2) {
    return group_norm(z2, q.size, q.groups, parameters.gamma2 + k * C, parameters.beta2 + k * C, q.eps);
}

// Sums over one block of images for the gradients of the convolutions, weights as (C in, 9 taps, C out).
struct alignas(64) Partial {
    float weight1[TAPS], weight2[TAPS], bias1[C], bias2[C];
};

// What a thread needs for itself on the way up: an image of a and one of z2, the weights' factors of a layer.
struct ForwardRoom {
    Buffer<float> a, z2, weight1, weight2;
    Workspace workspace;
    explicit ForwardRoom(Size size)
        : a(size.pixels() * C), z2(size.pixels() * C), weight1(WEIGHTS), weight2(WEIGHTS), workspace(size) {}
};

// x: (L, n, H, W, C), or (1, ...) without `keep`, with x[0] given; z1, z2 alike (z2 with a norm only); out: h_L.
// In evaluation mode the statistics are given, in training mode they are found.
inline void forward(const Problem& q, const Parameters& parameters, Statistics* statistics, float* x, float* z1, float* z2,
                    float* out) {
    const int64_t image = q.size.pixels() * C, n = q.images, stride = q.keep ? n * image : 0;
    const float step = 1.0f / q.depth;
    const bool batch = q.batch_norm && q.training;
    const Activate activate = activate_function<false>(q.activation);
    Buffer<float> moments1(n * 2 * C), moments2(n * 2 * C);
    const auto own = rooms<ForwardRoom>(q.threads, q.size);
#pragma omp parallel num_threads(q.threads)
    {
        const ForwardRoom& room = own[omp_get_thread_num()];
        float *const a = room.a, *const scratch = room.z2, *const weight1 = room.weight1, *const weight2 = room.weight2;
        const Workspace& workspace = room.workspace;
        Norm norm1, norm2;
        const auto z1_of = [&](int64_t k, int64_t i) { return z1 + k * stride + i * image; };
        const auto z2_of = [&](int64_t k, int64_t i) { return q.has_norm() ? z2 + k * stride + i * image : scratch; };
        const auto next_of = [&](int64_t k, int64_t i) { return (k + 1 == q.depth ? out : x + (k + 1) * stride) + i * image; };

        const auto first_convolution = [&](int64_t k, int64_t i) {
            const Ahead ahead{i + 1 < n ? z1_of(k, i + 1) : nullptr};
            convolve(x + k * stride + i * image, q.size, weight1, parameters.bias1 + k * C, z1_of(k, i), workspace, ahead);
            if (batch) image_moments(z1_of(k, i), q.size, moments1 + i * 2 * C);
            if (q.groups) norm1 = first_group_norm(q, parameters, k, z1_of(k, i));
        };
        const auto second_convolution = [&](int64_t k, int64_t i) {
            activate(z1_of(k, i), q.size, norm1.scale, norm1.shift, a, nullptr);
            const Ahead ahead{next_of(k, i), q.has_norm() && i + 1 < n ? z2_of(k, i + 1) : nullptr};
            convolve(a, q.size, weight2, parameters.bias2 + k * C, z2_of(k, i), workspace, ahead);
            if (batch) image_moments(z2_of(k, i), q.size, moments2 + i * 2 * C);
            if (q.groups) norm2 = second_group_norm(q, parameters, k, z2_of(k, i));
        };
        const auto residual = [&](int64_t k, int64_t i) {
            norm2.add_scaled(x + k * stride + i * image, step, z2_of(k, i), q.size, next_of(k, i));
        };

        for (int64_t k = 0; k < q.depth; k++) {
            weight_factors(parameters.weight1 + k * TAPS, false, weight1);
            weight_factors(parameters.weight2 + k * TAPS, false, weight2);
            if (batch) {  // each `omp for` ends with a barrier
                Statistics found;
#pragma omp for schedule(static)
                for (int64_t i = 0; i < n; i++) {
                    if (k > 0) residual(k - 1, i);
                    first_convolution(k, i);
                }
                batch_moments(moments1, n, q.size, found.mean1, found.variance1);
                norm1 = first_norm(parameters, found, k, q.eps);
#pragma omp for schedule(static)
                for (int64_t i = 0; i < n; i++) second_convolution(k, i);
                batch_moments(moments2, n, q.size, found.mean2, found.variance2);
                norm2 = second_norm(parameters, found, k, q.eps);
#pragma omp single nowait
                statistics[k] = found;
            } else {
                if (q.batch_norm) {
                    norm1 = first_norm(parameters, statistics[k], k, q.eps);
                    norm2 = second_norm(parameters, statistics[k], k, q.eps);
                }
#pragma omp for schedule(static) nowait
                for (int64_t i = 0; i < n; i++) {
                    first_convolution(k, i);
                    second_convolution(k, i);
                    residual(k, i);
                }
            }
        }
        if (batch) {
#pragma omp for schedule(static) nowait
            for (int64_t i = 0; i < n; i++) residual(q.depth - 1, i);
        }
    }
}

// Adds the blocks' sums in order: what LANE outputs of one input have in a weight's gradient, to PyTorch's layout.
inline void reduce_weight(const Partial* partial, float (Partial::*weight)[TAPS], int64_t blocks, int in, int out,
                          float* gradient) {
    Vec taps[9]{};
    for (int64_t b = 0; b < blocks; b++)
        for (int tap = 0; tap < 9; tap++) taps[tap] += load(partial[b].*weight + (in * 9 + tap) * C + out);
    for (int tap = 0; tap < 9; tap++)
        for (int lane = 0; lane < LANE; lane++) gradient[((out + lane) * C + in) * 9 + tap] = taps[tap][lane];
}

// What a thread needs for itself on the way back: images of a, s'(u), dz2 and dx, the reversed weights' factors of a
// layer, the weights' gradients.
struct BackwardRoom {
    Buffer<float> a, slope, dz2, dx, reversed1, reversed2;
    Workspace workspace;
    WeightGradient weight1, weight2;
    explicit BackwardRoom(Size size)
        : a(size.pixels() * C), slope(size.pixels() * C), dz2(size.pixels() * C), dx(size.pixels() * C), reversed1(WEIGHTS),
          reversed2(WEIGHTS), workspace(size), weight1(size), weight2(size) {}
};

// g: dL/dh_L on entry, dL/dh_0 on return; the rest as the forward pass kept it.
inline void backward(const Problem& q, const Parameters& parameters, const Statistics* statistics, const float* x, const float* z1,
                     const float* z2, float* g, const Gradients& gradients) {
    const int64_t image = q.size.pixels() * C, n = q.images, blocks = q.blocks();
    const float step = 1.0f / q.depth;
    const double share = q.training ? 1.0 / (double(n) * q.size.pixels()) : 0.0;  // turns sums into means
    const Activate activate = activate_function<true>(q.activation);
    // Two sets of sums: one is summed up while the next layer fills the other. Batch norm, whose threads wait for each
    // other in the middle of a layer, needs one of the images' sums.
    Buffer<float> du(n * image), sums1(2 * n * 2 * C), sums2(2 * n * 2 * C);
    Buffer<Partial> partials(2 * blocks);
    auto own = rooms<BackwardRoom>(q.threads, q.size);
#pragma omp parallel num_threads(q.threads)
    {
        BackwardRoom& room = own[omp_get_thread_num()];
        float *const a = room.a, *const slope = room.slope, *const dz2 = room.dz2, *const dx = room.dx;
        float *const reversed1 = room.reversed1, *const reversed2 = room.reversed2;
        const Workspace& workspace = room.workspace;
        WeightGradient &weight1 = room.weight1, &weight2 = room.weight2;
        Norm norm1, norm2;
        const auto each_image = [&](int64_t block, const auto& work) {
            for (int64_t i = block * IMAGES_A_BLOCK; i < std::min(n, (block + 1) * IMAGES_A_BLOCK); i++) work(i);
        };
        const auto last_of_block = [&](int64_t i) { return i + 1 == n || (i + 1) % IMAGES_A_BLOCK == 0; };
        const auto gradient_sums = [&](int64_t k, int64_t i) {
            norm2.sums(g + i * image, z2 + (k * n + i) * image, q.size, sums2 + i * 2 * C);
        };

        if (q.batch_norm) {
            norm2 = second_norm(parameters, statistics[q.depth - 1], q.depth - 1, q.eps);
#pragma omp for schedule(static)
            for (int64_t b = 0; b < blocks; b++) each_image(b, [&](int64_t i) { gradient_sums(q.depth - 1, i); });
        }
        for (int64_t k = q.depth - 1; k >= 0; k--) {
            const int64_t kept = k * n * image;
            Partial* partial = partials + (k % 2) * blocks;
            float *const own1 = sums1 + (k % 2) * n * 2 * C, *const own2 = sums2 + (k % 2) * n * 2 * C;
            alignas(64) float sum1[2 * C], sum2[2 * C], mean1[2 * C], mean2[2 * C];
            weight_factors(parameters.weight1 + k * TAPS, true, reversed1);
            weight_factors(parameters.weight2 + k * TAPS, true, reversed2);

            const auto second_convolution = [&](int64_t i) {  // g -> dz2 -> da -> du
                const float *gi = g + i * image, *z1i = z1 + kept + i * image;
                float* dui = du + i * image;
                Partial& sums = partial[i / IMAGES_A_BLOCK];
                if (i % IMAGES_A_BLOCK == 0) {
                    std::fill_n(sums.bias1, C, 0.0f);
                    std::fill_n(sums.bias2, C, 0.0f);
                }
                if (q.groups) {
                    const float* z2i = z2 + kept + i * image;
                    norm1 = first_group_norm(q, parameters, k, z1i);
                    norm2 = second_group_norm(q, parameters, k, z2i);
                    norm2.sums(gi, z2i, q.size, own2 + i * 2 * C);
                    group_means(own2 + i * 2 * C, q.size, q.groups, parameters.gamma2 + k * C, step, mean2);
                }
                if (q.has_norm())
                    norm2.backward(gi, step, z2 + kept + i * image, mean2, q.size, dz2);
                else
                    for (int64_t p = 0; p < image; p++) dz2[p] = gi[p] * step;
                add_pixels(dz2, q.size, sums.bias2);
                activate(z1i, q.size, norm1.scale, norm1.shift, a, slope);
                weight2.add(a, dz2, workspace, {q.has_norm() ? z1i + image : nullptr, q.has_norm() ? z1i + 2 * image : nullptr});
                if (last_of_block(i)) weight2.finish(sums.weight2);
                convolve(dz2, q.size, reversed2, nullptr, dui, workspace, {x + kept + i * image});
                for (int64_t p = 0; p < image; p++) dui[p] *= slope[p];
                if (q.batch_norm) norm1.sums(dui, z1i, q.size, sums1 + i * 2 * C);
                if (q.groups) {
                    norm1.sums(dui, z1i, q.size, own1 + i * 2 * C);
                    group_means(own1 + i * 2 * C, q.size, q.groups, parameters.gamma1 + k * C, 1, mean1);
                }
            };
            const auto first_convolution = [&](int64_t i) {  // du -> dz1 -> dx, added to g
                float *dz1 = du + i * image, *gi = g + i * image;
                Partial& sums = partial[i / IMAGES_A_BLOCK];
                if (q.has_norm()) norm1.backward(dz1, 1, z1 + kept + i * image, mean1, q.size, dz1);
                add_pixels(dz1, q.size, sums.bias1);
                weight1.add(x + kept + i * image, dz1, workspace);
                if (last_of_block(i)) weight1.finish(sums.weight1);
                const Ahead ahead{(k > 0 && q.has_norm() ? z2 : z1) + kept - (k > 0 ? n * image : 0) + i * image};
                convolve(dz1, q.size, reversed1, nullptr, dx, workspace, ahead);
                for (int64_t p = 0; p < image; p++) gi[p] += dx[p];
            };

            if (q.batch_norm) {
                norm1 = first_norm(parameters, statistics[k], k, q.eps);
                batch_sums(sums2, n, step, sum2);
                for (int c = 0; c < 2 * C; c++) mean2[c] = float(sum2[c] * share);
#pragma omp for schedule(static)
                for (int64_t b = 0; b < blocks; b++) each_image(b, second_convolution);
                batch_sums(sums1, n, 1, sum1);
                for (int c = 0; c < 2 * C; c++) mean1[c] = float(sum1[c] * share);
                if (k > 0) norm2 = second_norm(parameters, statistics[k - 1], k - 1, q.eps);
#pragma omp for schedule(static)
                for (int64_t b = 0; b < blocks; b++)
                    each_image(b, [&](int64_t i) {
                        first_convolution(i);
                        if (k > 0) gradient_sums(k - 1, i);
                    });
            } else {
#pragma omp for schedule(static)
                for (int64_t b = 0; b < blocks; b++)
                    each_image(b, [&](int64_t i) {
                        second_convolution(i);
                        first_convolution(i);
                    });
            }

            // All images of this layer are done.
            if (q.groups) {
                batch_sums(own1, n, 1, sum1);
                batch_sums(own2, n, step, sum2);
            }
#pragma omp for schedule(static) nowait
            for (int in = 0; in < C; in++)
                for (int out = 0; out < C; out += LANE) {
                    reduce_weight(partial, &Partial::weight1, blocks, in, out, gradients.weight1 + k * TAPS);
                    reduce_weight(partial, &Partial::weight2, blocks, in, out, gradients.weight2 + k * TAPS);
                }
#pragma omp single nowait
            for (int c = 0; c < C; c++) {
                const int64_t kc = k * C + c;
                gradients.bias1[kc] = gradients.bias2[kc] = 0;
                for (int64_t b = 0; b < blocks; b++) {
                    gradients.bias1[kc] += partial[b].bias1[c];
                    gradients.bias2[kc] += partial[b].bias2[c];
                }
                if (q.has_norm()) {
                    gradients.beta1[kc] = sum1[c], gradients.gamma1[kc] = sum1[C + c];
                    gradients.beta2[kc] = sum2[c], gradients.gamma2[kc] = sum2[C + c];
                }
            }
        }
    }
}

}  // namespace conv
