// The fully connected residual network of lib/network.py, whole steps of gradient descent. With row vectors,
//
//     z_k = inner * h_k W_k,   h_{k+1} = h_k + outer * s(z_k) V_k,                    W_k: (q, m), V_k: (m, q)
//     u_k = (p_{k+1} V_k^T) * s'(z_k),   p_k = p_{k+1} + outer * inner * u_k W_k^T,   p_L = dl/dh_L
//     dl/dV_k = outer * s(z_k)^T p_{k+1},   dl/dW_k = outer * inner * h_k^T u_k,      k = L-1, ..., 0.
//
// What makes it faster than one library call an operation: each thread carries its samples through all layers, so
// that a layer costs no call and no allocation; s(z_k) and s'(z_k) are stored where they fit a cache (the caller
// decides), else only the states h_k are, and z_k is recomputed on the way back; products, activation and residual run on a few samples at a time, in the innermost cache. The weight
// gradients, sums over all samples, are formed a chunk of layers at a time, each layer by one thread, and applied to
// the weights on the spot.
//
// Every entry is computed by one thread with its sum in one order, whatever the blocks are: any number of threads
// gives the same bits. Rows of h, p (q entries) and of z, u (m entries) are padded to whole vectors.
#include <omp.h>
#include <torch/extension.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>

#include "vector.h"

namespace {

constexpr int64_t BLOCK = 64;                  // samples that go through a layer together
constexpr int64_t CHUNK_BYTES = 1 << 19;       // what a chunk of layers keeps until its weight gradients are formed
constexpr int64_t WORK_A_THREAD = 20'000;      // multiply-adds in a layer below which another thread does not pay

// ---- Products of small matrices, held in registers ----

// sum[i][j] = row i of a times the columns from b on: ROWS rows, COLUMNS vectors.
template <class T, int ROWS, int COLUMNS, bool TRANSPOSED>
__attribute__((always_inline)) inline void multiply_tile(const T* a, int64_t a_row, const T* b, int64_t b_row, int64_t inner, Vector<T> (&sum)[ROWS][COLUMNS]) {
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
        for (int j = 0; j < COLUMNS; j++) sum[i][j] = Vector<T>{};
    for (int64_t k = 0; k < inner; k++, b += b_row) {
        Vector<T> column[COLUMNS];
#pragma GCC unroll 4
        for (int j = 0; j < COLUMNS; j++) column[j] = load(b + j * LANES<T>);
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; i++) {
            const T factor = TRANSPOSED ? a[k * a_row + i] : a[i * a_row + k];
#pragma GCC unroll 4
            for (int j = 0; j < COLUMNS; j++) sum[i][j] += factor * column[j];
        }
    }
}

template <class T, int ROWS, int COLUMNS, bool TRANSPOSED, class Use>
__attribute__((always_inline)) inline void multiply_rows(int64_t row, int64_t rows, const T* a, int64_t a_row, const T* b, int64_t b_row, int64_t inner,
                          int64_t column, const Use& use) {
    for (; row + ROWS <= rows; row += ROWS) {
        Vector<T> sum[ROWS][COLUMNS];
        multiply_tile<T, ROWS, COLUMNS, TRANSPOSED>(a + row * (TRANSPOSED ? 1 : a_row), a_row, b, b_row, inner, sum);
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
            for (int j = 0; j < COLUMNS; j++) use(row + i, column + j * LANES<T>, sum[i][j]);
    }
    if constexpr (ROWS > 1)
        if (row < rows)
            multiply_rows<T, ROWS / 2, COLUMNS, TRANSPOSED>(row, rows, a, a_row, b, b_row, inner, column, use);
}

// Calls use(row, column, vector) for every vector of a b, or of a^T b where TRANSPOSED: a holds ``inner`` columns
// (rows) and ``rows`` rows (columns), b holds ``inner`` rows of ``columns`` padded entries.
template <class T, bool TRANSPOSED, class Use>
__attribute__((always_inline)) inline void multiply(int64_t rows, const T* a, int64_t a_row, const T* b, int64_t b_row, int64_t inner, int64_t columns,
                     const Use& use) {
    // Sums held in registers at a time; rows of a^T b are widths, often powers of two.
    constexpr int SUMS = REGISTERS == 32 ? (TRANSPOSED ? 16 : 24) : 8;
    constexpr int64_t LANE = LANES<T>;
    int64_t column = 0;
    for (; column + 4 * LANE <= columns; column += 4 * LANE)
        multiply_rows<T, SUMS / 4, 4, TRANSPOSED>(0, rows, a, a_row, b + column, b_row, inner, column, use);
    for (; column + 2 * LANE <= columns; column += 2 * LANE)
        multiply_rows<T, SUMS / 2, 2, TRANSPOSED>(0, rows, a, a_row, b + column, b_row, inner, column, use);
    for (; column < columns; column += LANE)
        multiply_rows<T, 16, 1, TRANSPOSED>(0, rows, a, a_row, b + column, b_row, inner, column, use);
}

// ---- Activations over an array ----

template <class T>
using Activate = void (*)(const T* z, T* value, T* derivative, int64_t count);

template <class T, ActivationName NAME>
void activate(const T* z, T* value, T* derivative, int64_t count) {
    Vector<T> slope;
    if (derivative)
        for (int64_t i = 0; i < count; i += LANES<T>) {
            store(value + i, activation<T, NAME, true>(load(z + i), &slope));
            store(derivative + i, slope);
        }
    else
        for (int64_t i = 0; i < count; i += LANES<T>) store(value + i, activation<T, NAME, false>(load(z + i), &slope));
}

template <class T>
Activate<T> find_activation(int64_t name) {
    switch (name) {
        case GELU: return activate<T, GELU>;
        case RELU: return activate<T, RELU>;
        case TANH: return activate<T, TANH>;
        case IDENTITY: return activate<T, IDENTITY>;
        case SOFTPLUS: return activate<T, SOFTPLUS>;
        case LEAKY_RELU: return activate<T, LEAKY_RELU>;
    }
    TORCH_CHECK(false, "the dense engine has no activation number ", name);
}

// ---- Memory and threads ----

template <class T>
struct Buffer {  // aligned to vectors, zero at first
    explicit Buffer(int64_t count) : size((count * sizeof(T) + 63) / 64 * 64), data((T*)std::aligned_alloc(64, size), std::free) {
        if (!data) throw std::bad_alloc();
        std::memset(data.get(), 0, size);
    }
    operator T*() const { return data.get(); }
    size_t size;
    std::unique_ptr<T, decltype(&std::free)> data;
};

// A barrier that spins for some microseconds, then lets others run: threads may share their cores.
class Barrier {
  public:
    explicit Barrier(int count) : count(count) {}
    void wait() {
        const int now = generation.load(std::memory_order_acquire);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == count) {
            arrived.store(0, std::memory_order_relaxed);
            generation.store(now + 1, std::memory_order_release);
        } else {
            for (int spins = 0; generation.load(std::memory_order_acquire) == now; spins++)
                if (spins > 4000) std::this_thread::yield();
        }
    }

  private:
    const int count;
    std::atomic<int> arrived{0}, generation{0};
};

// What becomes of a weight gradient g: stored as it is, or w -= rate * clip(factor * g).
template <class T>
struct Update {
    T rate, factor, clip;  // rate 0: store
    T* V;                  // (L, m, q): where gradients go, or the weights
    T* W;                  // (L, q, m)

    void apply(T* target, int64_t row, int64_t column, int64_t width, T scale, Vector<T> sum) const {
        T* entry = target + row * width + column;
        const bool whole = column + LANES<T> <= width;  // a copy of known size is one instruction
        const size_t bytes = whole ? sizeof sum : (width - column) * sizeof(T);
        Vector<T> old{}, value = sum * scale;
        if (rate != 0) whole ? std::memcpy(&old, entry, sizeof old) : std::memcpy(&old, entry, bytes);
        if (rate != 0) {
            value *= factor;
            if (clip > 0) {
                value = value > clip ? spread<T>(clip) : value;
                value = value < -clip ? spread<T>(-clip) : value;
            }
            value = old - value * rate;
        }
        whole ? std::memcpy(entry, &value, sizeof value) : std::memcpy(entry, &value, bytes);
    }
};

// ---- The network ----

template <class T>
struct Stack {
    int64_t L, n, q, m, Q, M;  // Q, M: q and m padded to whole vectors
    T inner, outer;
    const T *V, *W;            // (L, m, q), (L, q, m)
    T* H;                      // (L+1, n, Q), zero in the padding
    T *value, *slope;          // (L, n, M): s(z_k) and s'(z_k) where they are kept, else null
    Activate<T> s;
    int threads;

    int64_t chunk() const {
        const int64_t bytes = n * (2 * M + Q) * sizeof(T);
        return std::clamp<int64_t>(CHUNK_BYTES / bytes / threads * threads, threads, std::max<int64_t>(L, threads));
    }
    int64_t first(int thread) const { return n * thread / threads; }

    // The weights of a layer, padded; transposed where the way back needs it.
    struct Packed {
        Packed(int64_t q, int64_t m, int64_t Q, int64_t M) : W(q * M), V(m * Q), Vt(q * M), Wt(m * Q) {}
        Buffer<T> W, V, Vt, Wt;
    };
    static const T* pack(const T* from, int64_t rows, int64_t columns, T* to, int64_t padded) {
        if (columns == padded) return from;
        for (int64_t i = 0; i < rows; i++) std::memcpy(to + i * padded, from + i * columns, columns * sizeof(T));
        return to;
    }
    static void transpose(const T* from, int64_t rows, int64_t columns, T* to, int64_t padded) {
        for (int64_t j = 0; j < columns; j++)
            for (int64_t i = 0; i < rows; i++) to[j * padded + i] = from[i * columns + j];
    }

    struct Scratch {
        explicit Scratch(int64_t M) : z(BLOCK * M), value(BLOCK * M), slope(BLOCK * M) {}
        Buffer<T> z, value, slope;
    };

    template <class Each>
    void blocks(int64_t from, int64_t to, const Each& each) const {  // of equal sizes, as far as that goes
        const int64_t count = (to - from + BLOCK - 1) / BLOCK;
        for (int64_t b = 0; b < count; b++) {
            const int64_t start = from + (to - from) * b / count;
            each(start, from + (to - from) * (b + 1) / count - start);
        }
    }

    void forward(int64_t from, int64_t to, Packed& packed, Scratch& scratch) const {
        for (int64_t k = 0; k < L; k++) {
            const T *w = pack(W + k * q * m, q, m, packed.W, M), *v = pack(V + k * q * m, m, q, packed.V, Q);
            blocks(from, to, [&](int64_t start, int64_t rows) {
                const T* h = H + (k * n + start) * Q;
                T *next = H + ((k + 1) * n + start) * Q, *z = scratch.z;
                T* a = value ? value + (k * n + start) * M : (T*)scratch.value;
                multiply<T, false>(rows, h, Q, w, M, q, M,
                                   [&](int64_t i, int64_t j, Vector<T> sum) { store(z + i * M + j, sum * inner); });
                s(z, a, value ? slope + (k * n + start) * M : nullptr, rows * M);
                multiply<T, false>(rows, a, M, v, Q, m, Q, [&](int64_t i, int64_t j, Vector<T> sum) {
                    store(next + i * Q + j, load(h + i * Q + j) + sum * outer);
                });
            });
        }
    }

    // The buffers of a chunk of layers: layer k of [start, start + count) has slot k - start, and p slot j holds
    // p_{start + j}.
    struct Chunk {
        Chunk(int64_t layers, int64_t n, int64_t Q, int64_t M) : value(layers * n * M), u(layers * n * M), p((layers + 1) * n * Q) {}
        Buffer<T> value, u, p;
    };

    void backward_layer(int64_t k, int64_t slot, int64_t from, int64_t to, Packed& packed, Scratch& scratch, Chunk& chunk) const {
        const T* w = value ? nullptr : pack(W + k * q * m, q, m, packed.W, M);
        transpose(W + k * q * m, q, m, packed.Wt, Q);
        transpose(V + k * q * m, m, q, packed.Vt, M);
        blocks(from, to, [&](int64_t start, int64_t rows) {
            const T *h = H + (k * n + start) * Q, *above = chunk.p + ((slot + 1) * n + start) * Q;
            T *below = chunk.p + (slot * n + start) * Q, *u = chunk.u + (slot * n + start) * M;
            const T* ds = value ? slope + (k * n + start) * M : (T*)scratch.slope;
            if (!value) {
                T* z = scratch.z;
                multiply<T, false>(rows, h, Q, w, M, q, M,
                                   [&](int64_t i, int64_t j, Vector<T> sum) { store(z + i * M + j, sum * inner); });
                s(z, chunk.value + (slot * n + start) * M, scratch.slope, rows * M);
            }
            multiply<T, false>(rows, above, Q, packed.Vt, M, q, M, [&](int64_t i, int64_t j, Vector<T> sum) {
                store(u + i * M + j, sum * load(ds + i * M + j));
            });
            const T scale = outer * inner;
            multiply<T, false>(rows, u, M, packed.Wt, Q, m, Q, [&](int64_t i, int64_t j, Vector<T> sum) {
                store(below + i * Q + j, load(above + i * Q + j) + sum * scale);
            });
        });
    }

    void weight_gradients(int64_t k, int64_t slot, const Chunk& chunk, const Update<T>& update) const {
        const T* a = value ? value + k * n * M : chunk.value + slot * n * M;
        multiply<T, true>(m, a, M, chunk.p + (slot + 1) * n * Q, Q, n, Q,
                          [&](int64_t i, int64_t j, Vector<T> sum) { update.apply(update.V + k * q * m, i, j, q, outer, sum); });
        multiply<T, true>(q, H + k * n * Q, Q, chunk.u + slot * n * M, M, n, M,
                          [&](int64_t i, int64_t j, Vector<T> sum) { update.apply(update.W + k * q * m, i, j, m, outer * inner, sum); });
    }

    // From p_L in `top` (n, Q) to the weight gradients; leaves p_0 in `top`.
    void backward(int thread, T* top, Packed& packed, Scratch& scratch, Chunk& chunk, int64_t layers, const Update<T>& update,
                  Barrier& barrier) const {
        const int64_t from = first(thread), to = first(thread + 1), row = (to - from) * Q * sizeof(T);
        for (int64_t stop = L; stop > 0;) {
            const int64_t start = std::max<int64_t>(0, stop - layers), count = stop - start;
            std::memcpy(chunk.p + (count * n + from) * Q, top + from * Q, row);
            for (int64_t slot = count - 1; slot >= 0; slot--) backward_layer(start + slot, slot, from, to, packed, scratch, chunk);
            std::memcpy(top + from * Q, chunk.p + from * Q, row);
            barrier.wait();  // all samples of the chunk are there
            for (int64_t slot = thread; slot < count; slot += threads) weight_gradients(start + slot, slot, chunk, update);
            barrier.wait();  // the chunk's buffers are free again
            stop = start;
        }
    }

    // top = 2 loss_scale (h_L - y); returns loss_scale * |h_L - y|^2 of each sample into `losses`.
    void residual(int64_t from, int64_t to, const T* y, double loss_scale, T* top, double* losses) const {
        const T* h = H + L * n * Q;
        for (int64_t i = from; i < to; i++) {
            double sum = 0;
            for (int64_t j = 0; j < q; j++) {
                const T difference = h[i * Q + j] - y[i * q + j];
                sum += double(difference) * difference;
                top[i * Q + j] = T(2 * loss_scale) * difference;
            }
            losses[i] = sum * loss_scale;
        }
    }

    // body(stack, thread, barrier) on every thread; the runtime may give fewer threads than asked for.
    template <class Body>
    void parallel(const Body& body) const {
        std::unique_ptr<Barrier> barrier;
#pragma omp parallel num_threads(threads)
        {
#pragma omp single
            barrier = std::make_unique<Barrier>(omp_get_num_threads());
            Stack mine = *this;
            mine.threads = omp_get_num_threads();
            body(mine, omp_get_thread_num(), *barrier);
        }
    }
};

// ---- From and to Python ----

template <class T>
Stack<T> make_stack(const at::Tensor& V, const at::Tensor& W, const at::Tensor& H, const at::Tensor& kept, double inner,
                    double outer, int64_t activation, int64_t threads) {
    const int64_t L = V.size(0), m = V.size(1), q = V.size(2), n = H.size(1), lane = LANES<T>;
    const int64_t Q = (q + lane - 1) / lane * lane, M = (m + lane - 1) / lane * lane;
    TORCH_CHECK(H.size(0) == L + 1 && H.size(2) == Q && H.is_contiguous(), "the states have another shape than (L+1, n, padded q)");
    const bool keeps = kept.numel() > 0;
    TORCH_CHECK(!keeps || (kept.is_contiguous() && kept.numel() == 2 * L * n * M), "kept has another shape than (2, L, n, padded m)");
    T* value = keeps ? kept.data_ptr<T>() : nullptr;
    const int64_t useful = std::max<int64_t>(1, n * q * m / WORK_A_THREAD);
    return {L, n, q, m, Q, M, T(inner), T(outer), V.data_ptr<T>(), W.data_ptr<T>(), H.data_ptr<T>(), value,
            keeps ? value + L * n * M : nullptr, find_activation<T>(activation),
            int(std::max<int64_t>(1, std::min({threads, n, useful})))};
}

template <class T>
void forward(const Stack<T>& stack) {
    stack.parallel([](const Stack<T>& mine, int thread, Barrier&) {
        typename Stack<T>::Packed packed(mine.q, mine.m, mine.Q, mine.M);
        typename Stack<T>::Scratch scratch(mine.M);
        mine.forward(mine.first(thread), mine.first(thread + 1), packed, scratch);
    });
}

template <class T>
void backward(const Stack<T>& stack, T* top, const Update<T>& update) {
    const int64_t layers = stack.chunk();
    typename Stack<T>::Chunk chunk(layers, stack.n, stack.Q, stack.M);
    stack.parallel([&](const Stack<T>& mine, int thread, Barrier& barrier) {
        typename Stack<T>::Packed packed(mine.q, mine.m, mine.Q, mine.M);
        typename Stack<T>::Scratch scratch(mine.M);
        mine.backward(thread, top, packed, scratch, chunk, layers, update, barrier);
    });
}

template <class T>
void run(const Stack<T>& stack, const T* y, double loss_scale, const Update<T>& update, int64_t count, double* losses) {
    const int64_t layers = stack.chunk();
    typename Stack<T>::Chunk chunk(layers, stack.n, stack.Q, stack.M);
    Buffer<T> top(stack.n * stack.Q);
    std::vector<double> by_sample(stack.n);
    stack.parallel([&](const Stack<T>& mine, int thread, Barrier& barrier) {
        typename Stack<T>::Packed packed(mine.q, mine.m, mine.Q, mine.M);
        typename Stack<T>::Scratch scratch(mine.M);
        const int64_t from = mine.first(thread), to = mine.first(thread + 1);
        for (int64_t step = 0; step < count; step++) {
            mine.forward(from, to, packed, scratch);
            mine.residual(from, to, y, loss_scale, top, by_sample.data());
            mine.backward(thread, top, packed, scratch, chunk, layers, update, barrier);
            // backward ended with a barrier: all residuals are there, and no thread writes them before the next one.
            if (thread == 0) {
                losses[step] = 0;
                for (double loss : by_sample) losses[step] += loss;
            }
            barrier.wait();
        }
    });
}

#define FOR_DTYPE(tensor, ...)                                       \
    if (tensor.scalar_type() == at::kDouble) {                       \
        using T = double;                                            \
        __VA_ARGS__                                                  \
    } else {                                                         \
        TORCH_CHECK(tensor.scalar_type() == at::kFloat, "the dense engine takes float32 and float64"); \
        using T = float;                                             \
        __VA_ARGS__                                                  \
    }

void dense_forward(at::Tensor V, at::Tensor W, at::Tensor H, at::Tensor kept, double inner, double outer, int64_t activation, int64_t threads) {
    FOR_DTYPE(V, {
        const auto stack = make_stack<T>(V, W, H, kept, inner, outer, activation, threads);
        pybind11::gil_scoped_release release;
        forward(stack);
    })
}

// top: (n, padded q), p_L on entry and p_0 on return. rate 0 stores the gradients in V_out and W_out; otherwise these
// are the weights V and W themselves and take a step.
void dense_backward(at::Tensor V, at::Tensor W, at::Tensor H, at::Tensor kept, at::Tensor top, at::Tensor V_out, at::Tensor W_out, double rate,
                    double factor, double clip, double inner, double outer, int64_t activation, int64_t threads) {
    FOR_DTYPE(V, {
        const auto stack = make_stack<T>(V, W, H, kept, inner, outer, activation, threads);
        const Update<T> update{T(rate), T(factor), T(clip), V_out.data_ptr<T>(), W_out.data_ptr<T>()};
        T* p = top.data_ptr<T>();
        pybind11::gil_scoped_release release;
        backward(stack, p, update);
    })
}

// `count` whole steps towards the targets y (n, q) where A and B are the identity; the loss before each, in losses.
void dense_run(at::Tensor V, at::Tensor W, at::Tensor H, at::Tensor kept, at::Tensor y, double loss_scale, double rate, double factor, double clip,
               at::Tensor losses, double inner, double outer, int64_t activation, int64_t threads) {
    FOR_DTYPE(V, {
        const auto stack = make_stack<T>(V, W, H, kept, inner, outer, activation, threads);
        const Update<T> update{T(rate), T(factor), T(clip), V.data_ptr<T>(), W.data_ptr<T>()};
        const T* targets = y.data_ptr<T>();
        double* before = losses.data_ptr<double>();
        const int64_t count = losses.size(0);
        pybind11::gil_scoped_release release;
        run(stack, targets, loss_scale, update, count, before);
    })
}

}  // namespace

void bind_dense_stack(pybind11::module_& m) {
    m.def("dense_forward", &dense_forward);
    m.def("dense_backward", &dense_backward);
    m.def("dense_run", &dense_run);
    m.def("dense_lanes", [](bool double_precision) { return double_precision ? LANES<double> : LANES<float>; });
}
