// The residual layers of the convolutional network, forward and backward:
//
//     h_{k+1} = h_k + (1/L) bn2(conv2(s(bn1(conv1(h_k))))),   k = 0..L-1,   conv 3x3 with bias, padding 1,
//
// with bn1 and bn2 absent in the variant without batch norm. What makes it faster than one library call an
// operation: a pixel's channels fill a vector (layout: image, row, column, channel), a few images at a time
// stay in the cache from one operation to the next, and activation, batch norm and residual run with the
// convolution that precedes or follows. Names: x = h_k, z1 = conv1(x), u = bn1(z1), a = s(u), z2 = conv2(a);
// dx is the gradient of the loss with respect to x, and so on.
//
// The images are cut into blocks whose size does not depend on the number of threads. Every sum over images
// adds first inside an image or a block, then over them in order: any number of threads gives the same bits.
#include <torch/extension.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <mutex>
#include <vector>

#include "vector.h"

namespace {

using Vec = Vector<float>;
constexpr int LANE = LANES<float>;
constexpr int IMAGES_A_BLOCK = 4;

// ---- One image: convolution, its two gradients, activation ----

// An image of `pixels` pixels, and the same with a border of zeros, in floats.
struct Size {
    int64_t height, width;
    int64_t pixels() const { return height * width; }
    int64_t padded() const { return (height + 2) * (width + 2); }
};

// ROWS x COLUMNS pixels of a convolution, kept in registers over the 9 C products of each.
template <int C, int ROWS, int COLUMNS>
inline void convolve_tile(const float* in, int64_t row, const float* w, const float* bias, float* out, int64_t out_row) {
    constexpr int V = C / LANE;
    Vec sum[ROWS][COLUMNS][V];
    for (auto& r : sum)
        for (auto& pixel : r)
            for (int v = 0; v < V; v++) pixel[v] = bias ? load(bias + v * LANE) : Vec{};
    for (int tap_row = 0; tap_row < 3; tap_row++)
        for (int tap_column = 0; tap_column < 3; tap_column++) {
            const float* p = in + tap_row * row + tap_column * C;
            for (int c = 0; c < C; c++, w += C) {
                Vec weight[V];
#pragma GCC unroll 16
                for (int v = 0; v < V; v++) weight[v] = load(w + v * LANE);
#pragma GCC unroll 16
                for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 16
                    for (int i = 0; i < COLUMNS; i++)
#pragma GCC unroll 16
                        for (int v = 0; v < V; v++) sum[r][i][v] += p[r * row + i * C + c] * weight[v];
            }
        }
    for (int r = 0; r < ROWS; r++)
        for (int i = 0; i < COLUMNS; i++)
            for (int v = 0; v < V; v++) store(out + r * out_row + i * C + v * LANE, sum[r][i][v]);
}

template <int C, int ROWS, int COLUMNS>
inline void convolve_rows(const float* in, Size size, int64_t column, const float* w, const float* bias, float* out) {
    const int64_t row = (size.width + 2) * C, out_row = size.width * C;
    for (; column + COLUMNS <= size.width; column += COLUMNS)
        convolve_tile<C, ROWS, COLUMNS>(in + column * C, row, w, bias, out + column * C, out_row);
    if constexpr (COLUMNS > 1)
        if (column < size.width) convolve_rows<C, ROWS, COLUMNS / 2>(in, size, column, w, bias, out);
}

// out = bias + conv(in); in: padded (H+2, W+2, C), w: (9 taps, C in, C out), out: (H, W, C).
template <int C>
__attribute__((noinline)) void convolve(const float* in, Size size, const float* w, const float* bias, float* out) {
    constexpr int V = C / LANE, SUMS = REGISTERS == 32 ? 20 : 10;
    constexpr int ROWS = SUMS / V >= 20 ? 2 : 1, COLUMNS = std::max(1, std::min(10, SUMS / V / ROWS));
    const int64_t row = (size.width + 2) * C, out_row = size.width * C;
    int64_t r = 0;
    for (; r + ROWS <= size.height; r += ROWS)
        convolve_rows<C, ROWS, COLUMNS>(in + r * row, size, 0, w, bias, out + r * out_row);
    for (; r < size.height; r++) convolve_rows<C, 1, COLUMNS>(in + r * row, size, 0, w, bias, out + r * out_row);
}

// dw += in (x) dout, the weights' gradient; in: padded, dout: (H, W, C), dw: (9 taps, C in, C out).
template <int C>
__attribute__((noinline)) void accumulate_weight_gradient(const float* in, Size size, const float* dout, float* dw) {
    constexpr int V = C / LANE, SUMS = REGISTERS == 32 ? 16 : 8, INPUTS = std::max(1, std::min(C, SUMS / V));
    for (int tap = 0; tap < 9; tap++)
        for (int first = 0; first < C; first += INPUTS, dw += INPUTS * C) {
            Vec sum[INPUTS][V];
#pragma GCC unroll 16
            for (int c = 0; c < INPUTS; c++)
#pragma GCC unroll 16
                for (int v = 0; v < V; v++) sum[c][v] = load(dw + c * C + v * LANE);
            for (int64_t r = 0; r < size.height; r++) {
                const float* p = in + ((r + tap / 3) * (size.width + 2) + tap % 3) * C + first;
                const float* d = dout + r * size.width * C;
                for (int64_t i = 0; i < size.width; i++, p += C, d += C) {
                    Vec gradient[V];
#pragma GCC unroll 16
                    for (int v = 0; v < V; v++) gradient[v] = load(d + v * LANE);
#pragma GCC unroll 16
                    for (int c = 0; c < INPUTS; c++)
#pragma GCC unroll 16
                        for (int v = 0; v < V; v++) sum[c][v] += p[c] * gradient[v];
                }
            }
#pragma GCC unroll 16
            for (int c = 0; c < INPUTS; c++)
#pragma GCC unroll 16
                for (int v = 0; v < V; v++) store(dw + c * C + v * LANE, sum[c][v]);
        }
}

template <int C>
void pad(const float* in, Size size, float* padded) {  // the border of `padded` is zero already
    for (int64_t r = 0; r < size.height; r++)
        std::memcpy(padded + ((r + 1) * (size.width + 2) + 1) * C, in + r * size.width * C, size.width * C * sizeof(float));
}

template <int C>
void add_pixels(const float* d, Size size, float* sums) {  // the bias's gradient
    for (int first = 0; first < C; first += LANE) {
        Vec sum{};
        for (int64_t p = first; p < size.pixels() * C; p += C) sum += load(d + p);
        store(sums + first, load(sums + first) + sum);
    }
}

// padded a = s(u), u = scale z1 + shift, and on request s'(u).
template <int C, ActivationName NAME, bool DERIVATIVE>
void activate(const float* z, Size size, const float* scale, const float* shift, float* padded, float* derivative) {
    for (int64_t r = 0; r < size.height; r++) {
        float* a = padded + ((r + 1) * (size.width + 2) + 1) * C;
        for (int64_t i = 0; i < size.width * C; i += LANE, z += LANE, derivative += DERIVATIVE ? LANE : 0) {
            const Vec u = load(z) * load(scale + i % C) + load(shift + i % C);
            Vec slope;
            store(a + i, activation<float, NAME, DERIVATIVE>(u, &slope));
            if (DERIVATIVE) store(derivative, slope);
        }
    }
}

using Activate = void (*)(const float*, Size, const float*, const float*, float*, float*);

template <int C, bool DERIVATIVE>
Activate activate_function(int64_t name) {
    switch (name) {
        case GELU: return activate<C, GELU, DERIVATIVE>;
        case RELU: return activate<C, RELU, DERIVATIVE>;
        case TANH: return activate<C, TANH, DERIVATIVE>;
        case SOFTPLUS: return activate<C, SOFTPLUS, DERIVATIVE>;
        case LEAKY_RELU: return activate<C, LEAKY_RELU, DERIVATIVE>;
        default: return activate<C, IDENTITY, DERIVATIVE>;
    }
}

// ---- Sums over the batch ----

// Mean and sum of squared deviations of each channel over one image, in two passes over the cached image.
template <int C>
void image_moments(const float* z, Size size, float* moments) {
    for (int first = 0; first < C; first += LANE) {
        Vec sum{}, squares{};
        for (int64_t p = 0; p < size.pixels(); p++) sum += load(z + p * C + first);
        const Vec mean = sum / float(size.pixels());
        for (int64_t p = 0; p < size.pixels(); p++) {
            const Vec deviation = load(z + p * C + first) - mean;
            squares += deviation * deviation;
        }
        store(moments + first, mean);
        store(moments + C + first, squares);
    }
}

// Batch mean and (biased) variance from the images' moments: total deviation = within images + between them.
template <int C>
void batch_moments(const float* moments, int64_t images, Size size, float* mean, float* variance) {
    for (int c = 0; c < C; c++) {
        double sum = 0, within = 0, between = 0;
        for (int64_t i = 0; i < images; i++) {
            sum += moments[i * 2 * C + c];
            within += moments[i * 2 * C + C + c];
        }
        const double average = sum / images;
        for (int64_t i = 0; i < images; i++) {
            const double deviation = moments[i * 2 * C + c] - average;
            between += deviation * deviation;
        }
        mean[c] = average;
        variance[c] = (within + between * size.pixels()) / (double(images) * size.pixels());
    }
}

template <int C>
void batch_sums(const float* per_image, int64_t images, float* sums) {  // (images, 2C) -> (2C)
    double total[2 * C] = {};
    for (int64_t i = 0; i < images; i++)
        for (int c = 0; c < 2 * C; c++) total[c] += per_image[i * 2 * C + c];
    for (int c = 0; c < 2 * C; c++) sums[c] = total[c];
}

// Sums over one image of d and of d times the normalised z: the gradients of beta and gamma.
template <int C>
void norm_sums(const float* d, const float* z, Size size, const float* mean, const float* inverse, float* sums) {
    for (int first = 0; first < C; first += LANE) {
        Vec sum{}, projection{};
        for (int64_t p = first; p < size.pixels() * C; p += C) {
            sum += load(d + p);
            projection += load(d + p) * ((load(z + p) - load(mean + first)) * load(inverse + first));
        }
        store(sums + first, sum);
        store(sums + C + first, projection);
    }
}

template <int C>
void batch_sums(const float* per_image, int64_t images, float factor, float* sums) {  // (images, 2C) -> (2C)
    double total[2 * C] = {};
    for (int64_t i = 0; i < images; i++)
        for (int c = 0; c < 2 * C; c++) total[c] += per_image[i * 2 * C + c];
    for (int c = 0; c < 2 * C; c++) sums[c] = float(total[c] * factor);
}

// ---- One layer's numbers ----

// Parameters: both weights as (9 taps, C in, C out), then the vectors.
template <int C>
struct alignas(64) Layer {
    float weight1[9 * C * C], weight2[9 * C * C], bias1[C], bias2[C], gamma1[C], beta1[C], gamma2[C], beta2[C];
};

// Mean and variance that the two batch norms divide by.
template <int C>
struct alignas(64) Statistics {
    float mean1[C], variance1[C], mean2[C], variance2[C];
};

// Sums of one block of images for the convolutions' gradients.
template <int C>
struct alignas(64) Partial {
    float weight1[9 * C * C], weight2[9 * C * C], bias1[C], bias2[C];
};

// A batch norm: z -> scale z + shift, where (z - mean) inverse is the normalised value. Absent: the identity.
template <int C>
struct alignas(64) Norm {
    float scale[C], shift[C], mean[C], inverse[C];

    Norm() : shift{}, mean{} {
        std::fill_n(scale, C, 1.0f);
        std::fill_n(inverse, C, 1.0f);
    }
    Norm(const float* mean_, const float* variance, const float* gamma, const float* beta, double eps) {
        for (int c = 0; c < C; c++) {
            mean[c] = mean_[c];
            inverse[c] = float(1 / std::sqrt(variance[c] + eps));
            scale[c] = gamma[c] * inverse[c];
            shift[c] = beta[c] - mean[c] * scale[c];
        }
    }

    // dz = scale (factor d - mean of d - normalised z * mean of (d normalised z)), the two means over the batch
    // where its own statistics were used (else they are zero).
    void backward(const float* d, float factor, const float* z, const float* means, Size size, float* dz) const {
        for (int first = 0; first < C; first += LANE) {
            const Vec s = load(scale + first), m = load(mean + first), r = load(inverse + first);
            const Vec mean_d = load(means + first), mean_projection = load(means + C + first);
            for (int64_t p = first; p < size.pixels() * C; p += C) {
                const Vec normalised = (load(z + p) - m) * r;
                store(dz + p, s * (load(d + p) * factor - mean_d - normalised * mean_projection));
            }
        }
    }
};

struct Problem {
    int64_t depth, images;
    Size size;
    bool batch_norm, training;  // training: normalise by the batch's own statistics
    bool keep;                  // keep x, z1 and z2 of all layers for the backward pass
    int64_t activation;
    double eps;
    int threads;
    int64_t blocks() const { return (images + IMAGES_A_BLOCK - 1) / IMAGES_A_BLOCK; }
};

class Buffer {  // zeros, aligned to a cache line
    float* data;

  public:
    explicit Buffer(int64_t count) {
        const size_t bytes = (count * sizeof(float) + 63) / 64 * 64;
        data = static_cast<float*>(std::aligned_alloc(64, bytes));
        if (!data) throw std::bad_alloc();
        std::memset(data, 0, bytes);
    }
    ~Buffer() { std::free(data); }
    Buffer(const Buffer&) = delete;
    operator float*() const { return data; }
};

// ---- The stack ----

// x: (L, n, H, W, C) or (1, ...) without `keep`, x[0] given; z1, z2 alike (z2 with batch norm only); out: h_L.
// The statistics are given in evaluation mode and found in training mode.
template <int C>
void forward(const Problem& q, const Layer<C>* layers, Statistics<C>* statistics, float* x, float* z1, float* z2, float* out) {
    const int64_t image = q.size.pixels() * C, n = q.images, stride = q.keep ? n * image : 0;
    const float step = 1.0f / q.depth;
    const bool batch = q.batch_norm && q.training;
    const Activate activate = activate_function<C, false>(q.activation);
    Buffer moments1(n * 2 * C), moments2(n * 2 * C);
#pragma omp parallel num_threads(q.threads)
    {
        Buffer padded(q.size.padded() * C), scratch(image);
        for (int64_t k = 0; k < q.depth; k++) {
            const Layer<C>& layer = layers[k];
            const float* xk = x + k * stride;
            float* next = k + 1 == q.depth ? out : x + (k + 1) * stride;
            const auto z1_of = [&](int64_t i) { return z1 + k * stride + i * image; };
            const auto z2_of = [&](int64_t i) { return q.batch_norm ? z2 + k * stride + i * image : scratch; };
            Norm<C> norm1, norm2;

            const auto first_convolution = [&](int64_t i) {
                pad<C>(xk + i * image, q.size, padded);
                convolve<C>(padded, q.size, layer.weight1, layer.bias1, z1_of(i));
                if (batch) image_moments<C>(z1_of(i), q.size, moments1 + i * 2 * C);
            };
            const auto second_convolution = [&](int64_t i) {
                activate(z1_of(i), q.size, norm1.scale, norm1.shift, padded, nullptr);
                convolve<C>(padded, q.size, layer.weight2, layer.bias2, z2_of(i));
                if (batch) image_moments<C>(z2_of(i), q.size, moments2 + i * 2 * C);
            };
            const auto residual = [&](int64_t i) {
                const float* z = z2_of(i);
                for (int first = 0; first < C; first += LANE) {
                    const Vec scale = load(norm2.scale + first) * step, shift = load(norm2.shift + first) * step;
                    for (int64_t p = first; p < image; p += C)
                        store(next + i * image + p, load(xk + i * image + p) + (load(z + p) * scale + shift));
                }
            };

            if (batch) {  // each `omp for` ends with a barrier, unless it says nowait
                Statistics<C> found;
#pragma omp for schedule(static)
                for (int64_t i = 0; i < n; i++) first_convolution(i);
                batch_moments<C>(moments1, n, q.size, found.mean1, found.variance1);
                norm1 = Norm<C>(found.mean1, found.variance1, layer.gamma1, layer.beta1, q.eps);
#pragma omp for schedule(static)
                for (int64_t i = 0; i < n; i++) second_convolution(i);
                batch_moments<C>(moments2, n, q.size, found.mean2, found.variance2);
                norm2 = Norm<C>(found.mean2, found.variance2, layer.gamma2, layer.beta2, q.eps);
#pragma omp single nowait
                statistics[k] = found;
#pragma omp for schedule(static) nowait
                for (int64_t i = 0; i < n; i++) residual(i);
            } else {
                if (q.batch_norm) {
                    const Statistics<C>& s = statistics[k];
                    norm1 = Norm<C>(s.mean1, s.variance1, layer.gamma1, layer.beta1, q.eps);
                    norm2 = Norm<C>(s.mean2, s.variance2, layer.gamma2, layer.beta2, q.eps);
                }
#pragma omp for schedule(static) nowait
                for (int64_t i = 0; i < n; i++) {
                    first_convolution(i);
                    second_convolution(i);
                    residual(i);
                }
            }
        }
    }
}

// Gradients of the parameters in PyTorch's layout, each stacked over the layers.
struct Gradients {
    float *weight1, *bias1, *weight2, *bias2, *gamma1, *beta1, *gamma2, *beta2;
};

// A weight for the gradient with respect to the input: (C out, C in), taps in reverse.
template <int C>
void flip(const float* weight, float* flipped) {
    for (int tap = 0; tap < 9; tap++)
        for (int in = 0; in < C; in++)
            for (int out = 0; out < C; out++) flipped[((8 - tap) * C + out) * C + in] = weight[(tap * C + in) * C + out];
}

// Adds the blocks' sums of entries [first, first + LANE) in order, and writes them in PyTorch's layout.
template <int C>
void reduce_weight(const float* partial, int64_t blocks, int64_t first, float* gradient) {
    constexpr int64_t block = sizeof(Partial<C>) / sizeof(float);
    Vec sum = load(partial + first);
    for (int64_t b = 1; b < blocks; b++) sum += load(partial + b * block + first);
    const int64_t tap = first / (C * C), in = first / C % C, out = first % C;
    for (int lane = 0; lane < LANE; lane++) gradient[((out + lane) * C + in) * 9 + tap] = sum[lane];
}

// g: dL/dh_L on entry, dL/dh_0 on return; the rest as kept by the forward pass.
template <int C>
void backward(const Problem& q, const Layer<C>* layers, const Statistics<C>* statistics, const float* x, const float* z1,
              const float* z2, float* g, Gradients gradients) {
    const int64_t image = q.size.pixels() * C, n = q.images, blocks = q.blocks();
    const float step = 1.0f / q.depth;
    const double share = q.training ? 1.0 / (double(n) * q.size.pixels()) : 0.0;  // turns sums into means
    const Activate activate = activate_function<C, true>(q.activation);
    Buffer du(n * image), sums1(n * 2 * C), sums2(n * 2 * C), flipped(q.depth * 18 * C * C);
    constexpr int64_t partial_size = sizeof(Partial<C>) / sizeof(float);
    Buffer partials(2 * blocks * partial_size);  // two sets: one is summed up while the next layer fills the other
#pragma omp parallel num_threads(q.threads)
    {
        Buffer padded(q.size.padded() * C), padded_d(q.size.padded() * C), dz(image), slope(image);
#pragma omp for schedule(static)
        for (int64_t k = 0; k < q.depth; k++) {
            flip<C>(layers[k].weight1, flipped + k * 18 * C * C);
            flip<C>(layers[k].weight2, flipped + k * 18 * C * C + 9 * C * C);
        }
        for (int64_t k = q.depth - 1; k >= 0; k--) {
            const Layer<C>& layer = layers[k];
            const float *xk = x + k * n * image, *z1k = z1 + k * n * image, *z2k = z2 + (q.batch_norm ? k * n * image : 0);
            const float *flipped1 = flipped + k * 18 * C * C, *flipped2 = flipped1 + 9 * C * C;
            auto* partial = reinterpret_cast<Partial<C>*>(partials + (k % 2) * blocks * partial_size);
            Norm<C> norm1, norm2;
            alignas(64) float total1[2 * C] = {}, total2[2 * C] = {}, mean1[2 * C], mean2[2 * C];
            if (q.batch_norm) {
                const Statistics<C>& s = statistics[k];
                norm1 = Norm<C>(s.mean1, s.variance1, layer.gamma1, layer.beta1, q.eps);
                norm2 = Norm<C>(s.mean2, s.variance2, layer.gamma2, layer.beta2, q.eps);
            }

            const auto second_convolution = [&](int64_t i) {  // g -> dz2 -> da -> du
                const float *gi = g + i * image, *z1i = z1k + i * image;
                Partial<C>& sums = partial[i / IMAGES_A_BLOCK];
                if (i % IMAGES_A_BLOCK == 0) std::memset(&sums, 0, sizeof sums);
                if (q.batch_norm)
                    norm2.backward(gi, step, z2k + i * image, mean2, q.size, dz);
                else
                    for (int64_t p = 0; p < image; p++) dz[p] = gi[p] * step;
                add_pixels<C>(dz, q.size, sums.bias2);
                activate(z1i, q.size, norm1.scale, norm1.shift, padded, slope);
                accumulate_weight_gradient<C>(padded, q.size, dz, sums.weight2);
                pad<C>(dz, q.size, padded_d);
                float* dui = du + i * image;
                convolve<C>(padded_d, q.size, flipped2, nullptr, dui);
                for (int64_t p = 0; p < image; p++) dui[p] *= slope[p];
                if (q.batch_norm) norm_sums<C>(dui, z1i, q.size, norm1.mean, norm1.inverse, sums1 + i * 2 * C);
            };
            const auto first_convolution = [&](int64_t i) {  // du -> dz1 -> dx, added to g
                float *d = du + i * image, *gi = g + i * image;
                Partial<C>& sums = partial[i / IMAGES_A_BLOCK];
                if (q.batch_norm) norm1.backward(d, 1, z1k + i * image, mean1, q.size, d);
                add_pixels<C>(d, q.size, sums.bias1);
                pad<C>(xk + i * image, q.size, padded);
                accumulate_weight_gradient<C>(padded, q.size, d, sums.weight1);
                pad<C>(d, q.size, padded_d);
                convolve<C>(padded_d, q.size, flipped1, nullptr, dz);
                for (int64_t p = 0; p < image; p++) gi[p] += dz[p];
            };
            const auto each_image = [&](int64_t block, const auto& work) {
                for (int64_t i = block * IMAGES_A_BLOCK; i < std::min(n, (block + 1) * IMAGES_A_BLOCK); i++) work(i);
            };

            if (q.batch_norm) {
#pragma omp for schedule(static)
                for (int64_t b = 0; b < blocks; b++)
                    each_image(b, [&](int64_t i) {
                        norm_sums<C>(g + i * image, z2k + i * image, q.size, norm2.mean, norm2.inverse, sums2 + i * 2 * C);
                    });
                batch_sums<C>(sums2, n, step, total2);
                for (int c = 0; c < 2 * C; c++) mean2[c] = float(total2[c] * share);
#pragma omp for schedule(static)
                for (int64_t b = 0; b < blocks; b++) each_image(b, second_convolution);
                batch_sums<C>(sums1, n, 1, total1);
                for (int c = 0; c < 2 * C; c++) mean1[c] = float(total1[c] * share);
#pragma omp for schedule(static)
                for (int64_t b = 0; b < blocks; b++) each_image(b, first_convolution);
            } else {
#pragma omp for schedule(static)
                for (int64_t b = 0; b < blocks; b++)
                    each_image(b, [&](int64_t i) {
                        second_convolution(i);
                        first_convolution(i);
                    });
            }

            // All blocks of this layer are done; the next layer fills the other set of partial sums meanwhile.
#pragma omp for schedule(static) nowait
            for (int64_t first = 0; first < 9 * C * C; first += LANE) {
                reduce_weight<C>(partial->weight1, blocks, first, gradients.weight1 + k * 9 * C * C);
                reduce_weight<C>(partial->weight2, blocks, first, gradients.weight2 + k * 9 * C * C);
            }
#pragma omp single nowait
            for (int c = 0; c < C; c++) {
                const int64_t kc = k * C + c;
                gradients.bias1[kc] = gradients.bias2[kc] = 0;
                for (int64_t b = 0; b < blocks; b++) {
                    gradients.bias1[kc] += partial[b].bias1[c];
                    gradients.bias2[kc] += partial[b].bias2[c];
                }
                if (q.batch_norm) {
                    gradients.beta1[kc] = total1[c], gradients.gamma1[kc] = total1[C + c];
                    gradients.beta2[kc] = total2[c], gradients.gamma2[kc] = total2[C + c];
                }
            }
        }
    }
}

// ---- Tensors in and out ----

using Tensors = std::vector<at::Tensor>;

// Memory for what the forward pass keeps. It is hundreds of megabytes, and asking the system for it afresh in
// every step would cost a quarter of the step: the last block freed is kept for the next.
class Recycled {
    static inline std::mutex mutex;
    static inline void* spare = nullptr;
    static inline int64_t spare_bytes = 0;

  public:
    static at::Tensor floats(at::IntArrayRef shape) {
        int64_t bytes = (c10::multiply_integers(shape) * int64_t(sizeof(float)) + 63) / 64 * 64;
        void* data = nullptr;
        {
            std::lock_guard<std::mutex> guard(mutex);
            if (spare_bytes >= bytes) {
                data = std::exchange(spare, nullptr);
                bytes = std::exchange(spare_bytes, 0);
            } else {
                release_locked();
            }
        }
        if (!data) data = std::aligned_alloc(64, bytes);
        TORCH_CHECK(data, "The compiled engine found no ", bytes >> 20, " MiB of memory for the layers' states; try a smaller batch.");
        return at::from_blob(data, shape, [bytes](void* block) {
            std::lock_guard<std::mutex> guard(mutex);
            if (bytes <= spare_bytes) return std::free(block);
            release_locked();
            spare = block;
            spare_bytes = bytes;
        }, at::kFloat);
    }
    static void release() {
        std::lock_guard<std::mutex> guard(mutex);
        release_locked();
    }

  private:
    static void release_locked() {
        std::free(std::exchange(spare, nullptr));
        spare_bytes = 0;
    }
};

// Order of the parameters: conv1.weight, conv1.bias, conv2.weight, conv2.bias, and with batch norm bn1.weight,
// bn1.bias, bn2.weight, bn2.bias, each stacked over the layers; of the running statistics: bn1.running_mean,
// bn1.running_var, bn2.running_mean, bn2.running_var.
template <int C>
at::Tensor pack(const Tensors& parameters) {
    const int64_t depth = parameters[0].size(0);
    at::Tensor packed = at::empty({depth, int64_t(sizeof(Layer<C>) / sizeof(float))});
    auto* layers = reinterpret_cast<Layer<C>*>(packed.data_ptr<float>());
    std::array<at::Tensor, 8> p;
    std::array<const float*, 8> source{};
    for (size_t j = 0; j < parameters.size(); j++) {
        p[j] = parameters[j].contiguous();
        source[j] = p[j].template data_ptr<float>();
    }
    for (int64_t k = 0; k < depth; k++) {
        Layer<C>& layer = layers[k];
        float* weights[] = {layer.weight1, layer.weight2};
        for (int w = 0; w < 2; w++)
            for (int out = 0; out < C; out++)
                for (int in = 0; in < C; in++)
                    for (int tap = 0; tap < 9; tap++)
                        weights[w][(tap * C + in) * C + out] = source[2 * w][((k * C + out) * C + in) * 9 + tap];
        float* vectors[] = {layer.bias1, layer.bias2, layer.gamma1, layer.beta1, layer.gamma2, layer.beta2};
        const float* values[] = {source[1], source[3], source[4], source[5], source[6], source[7]};
        for (int j = 0; j < 6; j++)
            if (values[j]) std::copy_n(values[j] + k * C, C, vectors[j]);
    }
    return packed;
}

Problem problem(const at::Tensor& h, int64_t depth, bool batch_norm, bool training, bool keep, int64_t activation, double eps) {
    Problem q{depth, h.size(0), {h.size(2), h.size(3)}, batch_norm, training, keep, activation, eps, 1};
    q.threads = int(std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), q.blocks())));
    return q;
}

template <int C>
Tensors forward_tensors(const at::Tensor& h, const Tensors& parameters, const Tensors& running, bool training, double momentum,
                        double eps, int64_t activation, bool keep) {
    const bool batch_norm = !running.empty();
    const int64_t depth = parameters[0].size(0), n = h.size(0), height = h.size(2), width = h.size(3);
    const Problem q = problem(h, depth, batch_norm, training, keep, activation, eps);
    const at::Tensor packed = pack<C>(parameters);
    at::Tensor statistics = at::empty({batch_norm ? depth : 0, 4, C});
    if (batch_norm && !training)
        for (int j = 0; j < 4; j++) statistics.select(1, j).copy_(running[j]);
    at::Tensor kept = Recycled::floats({batch_norm ? 3 : 2, keep ? depth : 1, n, height, width, C});
    at::Tensor out = at::empty({n, height, width, C});
    kept[0][0].copy_(h.permute({0, 2, 3, 1}));
    forward<C>(q, reinterpret_cast<const Layer<C>*>(packed.data_ptr<float>()), reinterpret_cast<Statistics<C>*>(statistics.data_ptr<float>()),
               kept[0].data_ptr<float>(), kept[1].data_ptr<float>(), batch_norm ? kept[2].data_ptr<float>() : nullptr, out.data_ptr<float>());
    if (batch_norm && training) {
        const double count = double(n) * height * width, unbiased = count / (count - 1);
        for (int j = 0; j < 4; j++) {
            at::Tensor r = running[j];  // the variance enters unbiased, as in PyTorch
            r.mul_(1 - momentum).add_(statistics.select(1, j), momentum * (j % 2 ? unbiased : 1.0));
        }
    }
    out = out.permute({0, 3, 1, 2});
    return keep ? Tensors{out, packed, statistics, kept} : Tensors{out};
}

template <int C>
Tensors backward_tensors(const at::Tensor& dout, const at::Tensor& packed, const at::Tensor& statistics, const at::Tensor& kept,
                         bool training, double eps, int64_t activation) {
    const int64_t depth = packed.size(0);
    const bool batch_norm = statistics.size(0) > 0;
    const Problem q = problem(dout, depth, batch_norm, training, true, activation, eps);
    at::Tensor g = at::empty({dout.size(0), dout.size(2), dout.size(3), C});
    g.copy_(dout.permute({0, 2, 3, 1}));
    Tensors result{g.permute({0, 3, 1, 2})};
    std::array<float*, 8> pointer{};
    for (int j = 0; j < (batch_norm ? 8 : 4); j++) {
        result.push_back(j == 0 || j == 2 ? at::empty({depth, C, C, 3, 3}) : at::empty({depth, C}));
        pointer[j] = result.back().data_ptr<float>();
    }
    backward<C>(q, reinterpret_cast<const Layer<C>*>(packed.data_ptr<float>()), reinterpret_cast<const Statistics<C>*>(statistics.data_ptr<float>()),
                kept[0].data_ptr<float>(), kept[1].data_ptr<float>(), batch_norm ? kept[2].data_ptr<float>() : nullptr, g.data_ptr<float>(),
                {pointer[0], pointer[1], pointer[2], pointer[3], pointer[4], pointer[5], pointer[6], pointer[7]});
    return result;
}

// A channel count C is supported where whole vectors hold it.
std::vector<int64_t> channel_counts() { return {16, 32}; }
static_assert(16 % LANE == 0);

Tensors conv_stack_forward(const at::Tensor& h, const Tensors& parameters, const Tensors& running, bool training, double momentum,
                           double eps, int64_t activation, bool keep) {
    at::NoGradGuard no_grad;
    const auto run = h.size(1) == 16 ? forward_tensors<16> : forward_tensors<32>;
    return run(h, parameters, running, training, momentum, eps, activation, keep);
}

Tensors conv_stack_backward(const at::Tensor& dout, const at::Tensor& packed, const at::Tensor& statistics, const at::Tensor& kept,
                            bool training, double eps, int64_t activation) {
    at::NoGradGuard no_grad;
    const auto run = dout.size(1) == 16 ? backward_tensors<16> : backward_tensors<32>;
    return run(dout, packed, statistics, kept, training, eps, activation);
}

}  // namespace

void bind_conv_stack(pybind11::module_& m) {
    const auto no_gil = pybind11::call_guard<pybind11::gil_scoped_release>();
    m.def("conv_stack_channels", &channel_counts);
    m.def("conv_stack_forward", &conv_stack_forward, no_gil);
    m.def("conv_stack_backward", &conv_stack_backward, no_gil);
    m.def("release_memory", &Recycled::release, no_gil);
}
