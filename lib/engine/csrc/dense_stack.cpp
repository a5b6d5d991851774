// The fully connected residual network of lib/dense/network.py, whole steps of gradient descent. With row vectors,
//
//     z_k = inner * h_k W_k,   h_{k+1} = h_k + outer * s(z_k) V_k,                    W_k: (q, m), V_k: (m, q)
//     u_k = (p_{k+1} V_k^T) * s'(z_k),   p_k = p_{k+1} + outer * inner * u_k W_k^T,   p_L = dl/dh_L
//     dl/dV_k = outer * s(z_k)^T p_{k+1},   dl/dW_k = outer * inner * h_k^T u_k,      k = L-1, ..., 0.
//
// What makes it faster than one library call an operation: each thread carries its samples through all layers, so
// that a layer costs no call and no allocation, and its products run on a few samples at a time, in the innermost
// cache. The way up keeps every h_k for the way back; in a network that stays in the caches also s(z_k) and s'(z_k),
// which in a deeper one are faster computed again than fetched. Every thread sums the weight gradients of its own
// samples, layer by layer; the sums meet, and the weights move, a chunk of layers at a time.
//
// The samples form groups, as many as the size of the problem asks for; every sum runs over a group in one order by
// one thread, and then over the groups: any number of threads gives the same bits. Rows of h, p (q entries) and of z,
// u (m entries) are padded to whole vectors.
#include <omp.h>
#include <torch/extension.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <utility>
#include <vector>

#include "vector.h"

namespace {

constexpr int64_t BLOCK = 64;              // samples that go through a layer together
constexpr int64_t CHUNK_BYTES = 1 << 19;   // what a chunk of layers keeps until its weight gradients meet
constexpr int64_t WORK_A_GROUP = 20'000;   // multiply-adds in a layer below which another thread does not pay
constexpr int64_t ROWS_A_GROUP = 24;       // samples, as few; each group has weight gradients of its own to write
constexpr int64_t MOST_GROUPS = 16;

// ---- Products of small matrices, held in registers ----

// sum[i][j] = row i of a times the columns from b on: ROWS rows, COLUMNS vectors.
template <class T, int ROWS, int COLUMNS, bool TRANSPOSED>
__attribute__((always_inline)) inline void multiply_tile(const T* a, int64_t a_row, const T* b, int64_t b_row, int64_t inner, Vector<T> (&sum)[ROWS][COLUMNS]) {
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
        for (int j = 0; j < COLUMNS; j++) sum[i][j] = Vector<T>{};
    // Three rows from each of a few addresses: one offset a row is more than the registers hold.
    const int64_t step = TRANSPOSED ? 1 : a_row, along = TRANSPOSED ? a_row : 1;
    const T* row[(ROWS + 2) / 3];
#pragma GCC unroll 6
    for (int i = 0; i < (ROWS + 2) / 3; i++) row[i] = a + 3 * i * step;
    for (int64_t k = 0; k < inner; k++, b += b_row) {
        Vector<T> column[COLUMNS];
#pragma GCC unroll 4
        for (int j = 0; j < COLUMNS; j++) column[j] = load(b + j * LANES<T>);
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; i++) {
            const T factor = TRANSPOSED ? a[i] : row[i / 3][i % 3 * step];
#pragma GCC unroll 4
            for (int j = 0; j < COLUMNS; j++) sum[i][j] += factor * column[j];
        }
        a += along;
#pragma GCC unroll 6
        for (int i = 0; i < (ROWS + 2) / 3; i++) row[i] += along;
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
    // Sums held in registers at a time; rows of a^T b are widths, often powers of two, other rows samples.
    constexpr int SUMS = REGISTERS == 32 ? (TRANSPOSED ? 16 : 20) : 8, TALLEST = TRANSPOSED || REGISTERS < 32 ? 16 : 10;
    constexpr int64_t LANE = LANES<T>;
    int64_t column = 0;
    for (; column + 4 * LANE <= columns; column += 4 * LANE)
        multiply_rows<T, SUMS / 4, 4, TRANSPOSED>(0, rows, a, a_row, b + column, b_row, inner, column, use);
    for (; column + 2 * LANE <= columns; column += 2 * LANE)
        multiply_rows<T, SUMS / 2, 2, TRANSPOSED>(0, rows, a, a_row, b + column, b_row, inner, column, use);
    for (; column < columns; column += LANE)
        multiply_rows<T, TALLEST, 1, TRANSPOSED>(0, rows, a, a_row, b + column, b_row, inner, column, use);
}

// ---- Activations over an array ----

// Memory that the next layer needs, fetched line by line while activations are computed, which need none. All at once,
// the requests would fill the queue to the memory and hold up what comes behind them.
class Ahead {
  public:
    void add(const void* from, int64_t bytes) { ranges[count++] = {(const char*)from, (const char*)from + bytes}; }
    void fetch_line() {
        if (now == count) return;
        __builtin_prefetch(ranges[now].next);
        ranges[now].next += 64;
        if (ranges[now].next >= ranges[now].end) now++;
    }
    void fetch_rest() {
        while (now < count) fetch_line();
        now = count = 0;
    }

  private:
    struct {
        const char *next, *end;
    } ranges[3];
    int now = 0, count = 0;
};

template <class T>
using Activate = void (*)(const T* z, T* value, T* derivative, int64_t count, Ahead& ahead);

template <class T, ActivationName NAME>
void activate(const T* z, T* value, T* derivative, int64_t count, Ahead& given) {
    Vector<T> slope;
    Ahead ahead = given;  // of which the compiler knows that nobody else sees it
    for (int64_t i = 0; i < count; i += LANES<T>) {
        ahead.fetch_line();
        if (derivative) {
            store(value + i, activation<T, NAME, true>(load(z + i), &slope));
            store(derivative + i, slope);
        } else {
            store(value + i, activation<T, NAME, false>(load(z + i), &slope));
        }
    }
    ahead.fetch_rest();
    given = ahead;
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

// ---- Threads ----

// A barrier that spins for some microseconds, then lets others run: threads may share their cores.
class Barrier {
  public:
    void set(int threads) { count = threads; }  // before any of them waits
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
    int count = 1;
    std::atomic<int> arrived{0}, generation{0};
};

// What becomes of a weight gradient g: stored as it is, or else w -= rate * clip(factor * g).
template <class T>
struct Update {
    bool only_gradient;
    T rate, factor, clip;
    T* V;                  // (L, m, q): where gradients go, or the weights
    T* W;                  // (L, q, m)

    Vector<T> apply(Vector<T> weight, Vector<T> gradient) const {
        if (only_gradient) return gradient;
        Vector<T> velocity = gradient * factor;
        if (clip > 0) {
            velocity = velocity > clip ? spread<T>(clip) : velocity;
            velocity = velocity < -clip ? spread<T>(-clip) : velocity;
        }
        return weight - velocity * rate;
    }

    // A row of a gradient, its sum over the groups, into a row of the weights.
    void apply_row(T* target, int64_t width, T scale, const T* sums, int64_t groups, int64_t next_group) const {
        for (int64_t j = 0; j < width; j += LANES<T>) {
            Vector<T> sum = load(sums + j);
            for (int64_t g = 1; g < groups; g++) sum += load(sums + g * next_group + j);
            sum *= scale;
            if (j + LANES<T> <= width) {
                store(target + j, apply(load(target + j), sum));
            } else {
                Vector<T> end{};
                std::memcpy(&end, target + j, (width - j) * sizeof(T));
                end = apply(end, sum);
                std::memcpy(target + j, &end, (width - j) * sizeof(T));
            }
        }
    }
};

// ---- The network ----

template <class T>
struct Stack {
    int64_t L, n, q, m, Q, M;  // Q, M: q and m padded to whole vectors
    int64_t groups;            // of samples
    bool keeps_activations;    // s(z_k) and s'(z_k), for the way back
    T inner, outer;
    const T *V, *W;            // (L, m, q), (L, q, m)
    T* ends;                   // (2, n, Q), zero in the padding: h_0 and h_L
    T* kept;                   // group by group: see Group
    Activate<T> s;
    int threads;

    int64_t weights() const { return m * Q + q * M; }  // entries of a layer's V and W, padded
    int64_t chunk() const { return std::clamp<int64_t>(CHUNK_BYTES / (weights() * groups * sizeof(T)), 1, L); }
    int64_t group_sums() const { return 2 * chunk() * weights(); }  // entries: two chunks take turns

    // Samples from `first` on, and what is kept of them: h_k for k < L, (L, rows, Q), and s(z_k), s'(z_k), (L, rows, M)
    // twice. What two threads write at a time lies far apart: where it is close, a core that reads ahead takes what the
    // other one writes.
    struct Group {
        int64_t number, first, rows;
        T *h, *value, *slope;
    };
    Group group(int64_t number) const {
        const int64_t first = n * number / groups, rows = n * (number + 1) / groups - first;
        T *h = kept + L * first * (Q + (keeps_activations ? 2 * M : 0)), *value = h + L * rows * Q;
        return {number, first, rows, h, value, value + L * rows * M};
    }
    int64_t first(int thread) const { return n * (groups * thread / threads) / groups; }
    int64_t count(int thread) const { return first(thread + 1) - first(thread); }

    template <class Each>
    void each_group(int thread, const Each& each) const {
        for (int64_t g = groups * thread / threads; g < groups * (thread + 1) / threads; g++) each(group(g));
    }

    // each(group, row in it, rows) for the blocks of this thread's groups, blocks of equal sizes as far as that goes.
    template <class Each>
    void each_block(int thread, const Each& each) const {
        each_group(thread, [&](const Group& group) {
            const int64_t count = (group.rows + BLOCK - 1) / BLOCK;
            for (int64_t b = 0; b < count; b++) {
                const int64_t row = group.rows * b / count;
                each(group, row, group.rows * (b + 1) / count - row);
            }
        });
    }

    // What one thread needs for itself: a layer's weights, padded; transposed where the way back needs it; what a block
    // does not keep; p_k of the thread's samples, of the layer that it is at. There is room for all samples: how many
    // threads there will be, and so how many samples each has, is not known yet.
    struct Scratch {
        explicit Scratch(const Stack& s)
            : W(s.q * s.M), V(s.m * s.Q), Vt(s.q * s.M), Wt(s.m * s.Q), z(BLOCK * s.M), value(BLOCK * s.M),
              slope(BLOCK * s.M), p(s.n * s.Q) {}
        Buffer<T> W, V, Vt, Wt, z, value, slope, p;
    };

    static const T* pack(const T* from, int64_t rows, int64_t columns, T* to, int64_t padded) {
        if (columns == padded) return from;
        for (int64_t i = 0; i < rows; i++) std::memcpy(to + i * padded, from + i * columns, columns * sizeof(T));
        return to;
    }

    void add_weights(int64_t k, Ahead& ahead) const {  // of layer k, which another thread may have moved
        ahead.add(W + k * q * m, q * m * sizeof(T));
        ahead.add(V + k * q * m, q * m * sizeof(T));
    }

    // z_k of a block of `rows` rows x = h_k in scratch.z, s(z_k) in `value`, s'(z_k) in `slope`, if that is not null.
    void hidden(int64_t rows, const T* x, const T* w, const Scratch& scratch, T* value, T* slope, Ahead& ahead) const {
        T* z = scratch.z;
        multiply<T, false>(rows, x, Q, w, M, q, M, [&](int64_t i, int64_t j, Vector<T> sum) { store(z + i * M + j, sum * inner); });
        s(z, value, slope, rows * M, ahead);
    }

    void forward_layer(int64_t k, int thread, const Scratch& scratch) const {
        Ahead ahead;
        if (k + 1 < L) add_weights(k + 1, ahead);
        const T *w = pack(W + k * q * m, q, m, scratch.W, M), *v = pack(V + k * q * m, m, q, scratch.V, Q);
        each_block(thread, [&](const Group& group, int64_t row, int64_t rows) {
            const int64_t place = k * group.rows + row;
            const T* x = group.h + place * Q;
            T* next = k + 1 < L ? group.h + (place + group.rows) * Q : ends + (n + group.first + row) * Q;
            T *value = scratch.value, *slope = nullptr;
            if (keeps_activations) value = group.value + place * M, slope = group.slope + place * M;
            hidden(rows, x, w, scratch, value, slope, ahead);
            multiply<T, false>(rows, value, M, v, Q, m, Q, [&](int64_t i, int64_t j, Vector<T> sum) {
                store(next + i * Q + j, load(x + i * Q + j) + sum * outer);
            });
        });
    }

    void forward(int thread, const Scratch& scratch) const {
        each_group(thread, [&](const Group& group) { std::memcpy(group.h, ends + group.first * Q, group.rows * Q * sizeof(T)); });
        for (int64_t k = 0; k < L; k++) forward_layer(k, thread, scratch);
    }

    // p_{k+1} in scratch.p becomes p_k; the weight gradients of each group go to its sums, from where they are of group 0.
    void backward_layer(int64_t k, int thread, T* sums, const Scratch& scratch) const {
        Ahead ahead;
        if (k > 0 && !keeps_activations) add_weights(k - 1, ahead);
        const T* w = keeps_activations ? nullptr : pack(W + k * q * m, q, m, scratch.W, M);
        transpose(W + k * q * m, q, m, (T*)scratch.Wt, Q);
        transpose(V + k * q * m, m, q, (T*)scratch.Vt, M);
        each_block(thread, [&](const Group& group, int64_t row, int64_t rows) {
            const int64_t place = k * group.rows + row;
            const T *x = group.h + place * Q, *value = scratch.value, *slope = scratch.slope;
            if (keeps_activations) {
                value = group.value + place * M, slope = group.slope + place * M;
            } else {
                if (k > 0) ahead.add(x - group.rows * Q, rows * Q * sizeof(T));
                hidden(rows, x, w, scratch, scratch.value, scratch.slope, ahead);
            }
            T *p = scratch.p + (group.first - first(thread) + row) * Q, *u = scratch.z;
            T *for_V = sums + group.number * group_sums(), *for_W = for_V + m * Q;
            multiply<T, false>(rows, p, Q, scratch.Vt, M, q, M, [&](int64_t i, int64_t j, Vector<T> sum) {
                store(u + i * M + j, sum * load(slope + i * M + j));
            });
            const auto add = [&](T* to, int64_t width) {
                return [=](int64_t i, int64_t j, Vector<T> sum) {
                    T* entry = to + i * width + j;
                    store(entry, row == 0 ? sum : load(entry) + sum);
                };
            };
            multiply<T, true>(m, value, M, p, Q, rows, Q, add(for_V, Q));
            multiply<T, true>(q, x, Q, u, M, rows, M, add(for_W, M));
            const T scale = outer * inner;
            multiply<T, false>(rows, u, M, scratch.Wt, Q, m, Q, [&](int64_t i, int64_t j, Vector<T> sum) {
                store(p + i * Q + j, load(p + i * Q + j) + sum * scale);
            });
        });
    }

    // The sums of the groups, in order, become the gradients or the update of layer k.
    void update_layer(int64_t k, const T* sums, const Update<T>& update) const {
        for (int64_t i = 0; i < m; i++) update.apply_row(update.V + (k * m + i) * q, q, outer, sums + i * Q, groups, group_sums());
        sums += m * Q;
        for (int64_t i = 0; i < q; i++) update.apply_row(update.W + (k * q + i) * m, m, outer * inner, sums + i * M, groups, group_sums());
    }

    // From p_L in scratch.p to the weight gradients and p_0 there.
    void backward(int thread, T* sums, const Scratch& scratch, const Update<T>& update, Barrier& barrier) const {
        const int64_t layers = chunk();
        int64_t stop = L;  // layers from here on have moved
        for (int64_t k = L - 1; k >= 0; k--) {
            // Chunks take turns in two halves of `sums`: past a barrier, all threads are done with the half that comes
            // next, and the other one is complete.
            T* half = sums + ((L - stop) / layers % 2) * layers * weights();
            backward_layer(k, thread, half + (stop - 1 - k) * weights(), scratch);
            if (k > 0 && stop - k < layers) continue;
            barrier.wait();
            const int64_t count = stop - k;
            for (int64_t i = count * thread / threads; i < count * (thread + 1) / threads; i++)
                update_layer(stop - 1 - i, half + i * weights(), update);
            stop = k;
        }
        barrier.wait();  // all layers have moved
    }

    // scratch.p = 2 loss_scale (h_L - y); loss_scale * |h_L - y|^2 of each of the thread's samples into `losses`.
    void residual(int thread, const T* y, double loss_scale, const Scratch& scratch, double* losses) const {
        const T* output = ends + n * Q;
        for (int64_t i = first(thread); i < first(thread + 1); i++) {
            double sum = 0;
            for (int64_t j = 0; j < q; j++) {
                const T difference = output[i * Q + j] - y[i * q + j];
                sum += double(difference) * difference;
                scratch.p[(i - first(thread)) * Q + j] = T(2 * loss_scale) * difference;
            }
            losses[i] = sum * loss_scale;
        }
    }

    // body(stack, thread, scratch, barrier) on every thread; the runtime may give fewer threads than asked for.
    template <class Body>
    void parallel(const Body& body) const {
        const std::vector<Scratch> scratch = rooms<Scratch>(threads, *this);
        Barrier barrier;
#pragma omp parallel num_threads(threads)
        {
#pragma omp single
            barrier.set(omp_get_num_threads());
            Stack mine = *this;
            mine.threads = omp_get_num_threads();
            const int thread = omp_get_thread_num();
            body(mine, thread, scratch[thread], barrier);
        }
    }
};

// ---- From and to Python ----

int64_t groups_of(int64_t n, int64_t q, int64_t m) {
    return std::clamp<int64_t>(std::min(n * q * m / WORK_A_GROUP, n / ROWS_A_GROUP), 1, MOST_GROUPS);
}

template <class T>
Stack<T> make_stack(const at::Tensor& V, const at::Tensor& W, const at::Tensor& ends, const at::Tensor& kept, double inner,
                    double outer, int64_t activation, int64_t threads) {
    const int64_t L = V.size(0), m = V.size(1), q = V.size(2), n = ends.size(1), lane = LANES<T>;
    const int64_t Q = (q + lane - 1) / lane * lane, M = (m + lane - 1) / lane * lane;
    TORCH_CHECK(ends.is_contiguous() && ends.size(0) == 2 && ends.size(2) == Q, "the ends have another shape than (2, n, padded q)");
    TORCH_CHECK(kept.is_contiguous() && kept.size(0) == L && (kept.size(1) == n * Q || kept.size(1) == n * (2 * M + Q)),
                "kept has another shape than (L, n padded q) or (L, n (2 padded m + padded q))");
    const int64_t groups = groups_of(n, q, m);
    return {L, n, q, m, Q, M, groups, kept.size(1) > n * Q, T(inner), T(outer), V.data_ptr<T>(), W.data_ptr<T>(), ends.data_ptr<T>(),
            kept.data_ptr<T>(), find_activation<T>(activation), int(std::clamp<int64_t>(threads, 1, groups))};
}

template <class T>
void forward(const Stack<T>& stack) {
    stack.parallel([](const Stack<T>& mine, int thread, const auto& scratch, Barrier&) {
        mine.forward(thread, scratch);
    });
}

template <class T>
void backward(const Stack<T>& stack, T* p, const Update<T>& update) {
    Buffer<T> sums(stack.groups * stack.group_sums());
    stack.parallel([&](const Stack<T>& mine, int thread, const auto& scratch, Barrier& barrier) {
        T* rows = p + mine.first(thread) * mine.Q;
        const size_t bytes = mine.count(thread) * mine.Q * sizeof(T);
        std::memcpy(scratch.p, rows, bytes);
        mine.backward(thread, sums, scratch, update, barrier);
        std::memcpy(rows, scratch.p, bytes);
    });
}

// A: (d, q) and B: (q, d') at the ends of a network, H_0 = X A and F(X) = H_L B. One thread computes them.
template <class T>
struct Ends {
    const T* x;      // (n, d)
    T *A, *B;        // null if both are the identity
    int64_t d, outputs;
    bool trained;
    Buffer<T> above, sums;  // dl/dF of a sample, (d',); a gradient, (d, q) or (q, d')

    void descend(T* weights, int64_t count, const Update<T>& update) const {
        for (int64_t i = 0; i < count; i++) {
            const T velocity = update.clip > 0 ? std::clamp(sums[i], -update.clip, update.clip) : sums[i];
            weights[i] -= update.rate * velocity;
        }
    }

    void set_input(const Stack<T>& stack) const {
        for (int64_t i = 0; i < stack.n; i++) {
            T* h = stack.ends + i * stack.Q;
            std::fill_n(h, stack.q, T(0));
            for (int64_t k = 0; k < d; k++)
                for (int64_t j = 0; j < stack.q; j++) h[j] += x[i * d + k] * A[k * stack.q + j];
        }
    }

    // The loss; p_L = dl/dF B^T of each sample into `top`, (n, Q). B moves.
    double set_top(const Stack<T>& stack, const T* y, double loss_scale, const Update<T>& update, T* top) const {
        const int64_t q = stack.q, Q = stack.Q;
        const T* H = stack.ends + stack.n * Q;
        std::fill_n((T*)sums, q * outputs, T(0));
        double loss = 0;
        for (int64_t i = 0; i < stack.n; i++, H += Q, top += Q, y += outputs) {
            std::fill_n((T*)above, outputs, T(0));
            for (int64_t j = 0; j < q; j++)
                for (int64_t a = 0; a < outputs; a++) above[a] += H[j] * B[j * outputs + a];
            for (int64_t a = 0; a < outputs; a++) {
                const T difference = above[a] - y[a];
                loss += double(difference) * difference;
                above[a] = T(2 * loss_scale) * difference;
            }
            for (int64_t j = 0; j < q; j++) {
                T sum = 0;
                for (int64_t a = 0; a < outputs; a++) {
                    sum += above[a] * B[j * outputs + a];
                    sums[j * outputs + a] += H[j] * above[a];
                }
                top[j] = sum;
            }
        }
        if (trained) descend(B, q * outputs, update);
        return loss * loss_scale;
    }

    // A moves, with p_0 of each sample in `bottom`, (n, Q).
    void move_input(const Stack<T>& stack, const T* bottom, const Update<T>& update) const {
        std::fill_n((T*)sums, d * stack.q, T(0));
        for (int64_t i = 0; i < stack.n; i++)
            for (int64_t k = 0; k < d; k++)
                for (int64_t j = 0; j < stack.q; j++) sums[k * stack.q + j] += x[i * d + k] * bottom[i * stack.Q + j];
        descend(A, d * stack.q, update);
        set_input(stack);
    }
};

template <class T>
void run(const Stack<T>& stack, const Ends<T>& ends, const T* y, double loss_scale, const Update<T>& update, int64_t count, double* losses) {
    Buffer<T> sums(stack.groups * stack.group_sums()), between(stack.n * stack.Q);  // p_L, and then p_0
    std::vector<double> by_sample(2 * stack.n);  // of even and odd steps: between two of a kind there is a barrier
    if (ends.A) ends.set_input(stack);
    stack.parallel([&](const Stack<T>& mine, int thread, const auto& scratch, Barrier& barrier) {
        T* rows = between + mine.first(thread) * mine.Q;
        const size_t bytes = mine.count(thread) * mine.Q * sizeof(T);
        for (int64_t step = 0; step < count; step++) {
            double* now = by_sample.data() + step % 2 * mine.n;
            mine.forward(thread, scratch);
            if (ends.A) {
                barrier.wait();
                if (thread == 0) losses[step] = ends.set_top(mine, y, loss_scale, update, between);
                barrier.wait();
                std::memcpy(scratch.p, rows, bytes);
            } else {
                mine.residual(thread, y, loss_scale, scratch, now);
            }
            mine.backward(thread, sums, scratch, update, barrier);
            if (ends.A) {
                if (!ends.trained) continue;
                std::memcpy(rows, scratch.p, bytes);
                barrier.wait();
                if (thread == 0) ends.move_input(mine, between, update);
                barrier.wait();
            } else if (thread == 0) {
                losses[step] = 0;
                for (int64_t i = 0; i < mine.n; i++) losses[step] += now[i];
            }
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

void dense_forward(at::Tensor V, at::Tensor W, at::Tensor ends, at::Tensor kept, double inner, double outer, int64_t activation, int64_t threads) {
    FOR_DTYPE(V, {
        const auto stack = make_stack<T>(V, W, ends, kept, inner, outer, activation, threads);
        pybind11::gil_scoped_release release;
        forward(stack);
    })
}

// top: (n, padded q), p_L on entry and p_0 on return. `only_gradient` puts the gradients into V_out and W_out; otherwise these
// are the weights V and W themselves and take a step.
void dense_backward(at::Tensor V, at::Tensor W, at::Tensor ends, at::Tensor kept, at::Tensor top, at::Tensor V_out, at::Tensor W_out, bool only_gradient,
                    double rate, double factor, double clip, double inner, double outer, int64_t activation, int64_t threads) {
    FOR_DTYPE(V, {
        const auto stack = make_stack<T>(V, W, ends, kept, inner, outer, activation, threads);
        const Update<T> update{only_gradient, T(rate), T(factor), T(clip), V_out.data_ptr<T>(), W_out.data_ptr<T>()};
        T* p = top.data_ptr<T>();
        pybind11::gil_scoped_release release;
        backward(stack, p, update);
    })
}

// `count` whole steps towards the targets y (n, d'); the loss before each, in losses. A and B are the identity, or tensors;
// then x (n, d) is the input, and they move if `train_ends`.
void dense_run(at::Tensor V, at::Tensor W, at::Tensor ends, at::Tensor kept, at::Tensor x, std::optional<at::Tensor> A, std::optional<at::Tensor> B,
               bool train_ends, at::Tensor y, double loss_scale, double rate, double factor, double clip, at::Tensor losses, double inner, double outer,
               int64_t activation, int64_t threads) {
    FOR_DTYPE(V, {
        const auto stack = make_stack<T>(V, W, ends, kept, inner, outer, activation, threads);
        const Update<T> update{false, T(rate), T(factor), T(clip), V.data_ptr<T>(), W.data_ptr<T>()};
        const Ends<T> given{x.data_ptr<T>(), A ? A->data_ptr<T>() : nullptr, B ? B->data_ptr<T>() : nullptr, x.size(1), y.size(1), train_ends,
                            Buffer<T>(y.size(1)), Buffer<T>(V.size(2) * std::max(x.size(1), y.size(1)))};
        const T* targets = y.data_ptr<T>();
        double* before = losses.data_ptr<double>();
        const int64_t count = losses.size(0);
        pybind11::gil_scoped_release release;
        run(stack, given, targets, loss_scale, update, count, before);
    })
}

}  // namespace

void bind_dense_stack(pybind11::module_& m) {
    m.def("dense_forward", &dense_forward);
    m.def("dense_backward", &dense_backward);
    m.def("dense_run", &dense_run);
    m.def("dense_lanes", [](bool double_precision) { return double_precision ? LANES<double> : LANES<float>; });
}
