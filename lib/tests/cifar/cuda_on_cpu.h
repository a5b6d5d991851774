// What conv_stack.cu needs of CUDA, for tests on a CPU: every thread is a fibre that runs up to its next meeting with
// others. Slow, and without races, since fibres take turns.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define KERNEL inline void
#define CLUSTER_KERNEL inline void
#define DEVICE inline
#define UNROLL
#define KEEP_ROLLED

struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
struct uint4 { unsigned x, y, z, w; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace fibres {

constexpr int THREADS = 32 * WARPS;

struct Meeting {
    int size, arrived = 0;
    long turn = 0;
};
struct Group {  // a block
    std::vector<float> shared;
    Meeting all{THREADS}, cluster{THREADS * BLOCKS};  // the first block's is that of its cluster
    std::vector<Meeting> warps{THREADS / 32, Meeting{32}};
    double exchanged[THREADS][4];
};
struct Fibre {
    ucontext_t context;  // where it begins
    jmp_buf place;       // where it rests: unlike swapcontext, a jump asks the system for nothing
    std::unique_ptr<char[]> stack;
    Group* group;
    unsigned block, thread;
    bool begun = false, done = false;
    long awaited = 0;
    const Meeting* meeting = nullptr;  // that it rests at, until its turn is not `turn`
    long turn = 0;
};

inline Fibre* now = nullptr;
inline std::vector<Group>* groups = nullptr;
inline ucontext_t start;
inline jmp_buf scheduler;
inline std::function<void()> body;

inline void rest(const Meeting& meeting, long turn) {
    if (meeting.turn != turn) return;
    now->meeting = &meeting, now->turn = turn;
    if (!_setjmp(now->place)) _longjmp(scheduler, 1);
}
inline long join(Meeting& meeting) {
    const long turn = meeting.turn;
    if (++meeting.arrived == meeting.size) {
        meeting.arrived = 0;
        ++meeting.turn;
    }
    return turn;
}
inline void meet(Meeting& meeting) { rest(meeting, join(meeting)); }
inline void meet_warp() { meet(now->group->warps[now->thread / 32]); }
inline void enter() {
    body();
    now->done = true;
    _longjmp(scheduler, 1);
}
// Run the fibre up to its next rest, or its end.
inline void go_on(Fibre& fibre) {
    now = &fibre;
    if (_setjmp(scheduler)) return;
    if (fibre.begun) _longjmp(fibre.place, 1);
    fibre.begun = true;
    swapcontext(&start, &fibre.context);
}

inline void launch(unsigned blocks, size_t shared_bytes, std::function<void()> kernel) {
    body = std::move(kernel);
    std::vector<Group> all_groups(blocks);
    groups = &all_groups;
    std::vector<Fibre> all(blocks * THREADS);
    for (unsigned i = 0; i < all.size(); ++i) {
        Fibre& fibre = all[i];
        fibre.block = i / THREADS, fibre.thread = i % THREADS, fibre.group = &all_groups[fibre.block];
        if (fibre.thread == 0) fibre.group->shared.assign(shared_bytes / sizeof(float), NAN);
        fibre.stack.reset(new char[1 << 16]);
        getcontext(&fibre.context);
        fibre.context.uc_stack.ss_sp = fibre.stack.get();
        fibre.context.uc_stack.ss_size = 1 << 16;
        makecontext(&fibre.context, enter, 0);
    }
    for (bool left = true; left;) {
        left = false;
        for (Fibre& fibre : all)
            if (!fibre.done) {
                if (!fibre.meeting || fibre.meeting->turn != fibre.turn) go_on(fibre);
                left = true;
            }
    }
}

struct ThreadIndex { struct { operator unsigned() const { return now->thread; } } x; };
struct BlockIndex { struct { operator unsigned() const { return now->block; } } x; };

}  // namespace fibres

inline fibres::ThreadIndex threadIdx;
inline fibres::BlockIndex blockIdx;

inline float* dynamic_shared() { return fibres::now->group->shared.data(); }
inline unsigned shared_address(const void* p) {
    return static_cast<unsigned>(static_cast<const char*>(p) - reinterpret_cast<const char*>(dynamic_shared()));
}
inline void __syncthreads() { fibres::meet(fibres::now->group->all); }
inline void __syncwarp() { fibres::meet_warp(); }
inline void __threadfence() {}
inline void prefetch(const void*) {}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline unsigned __float_as_uint(float x) { unsigned u; return std::memcpy(&u, &x, 4), u; }
inline float __uint_as_float(unsigned u) { float x; return std::memcpy(&x, &u, 4), x; }

inline void send(double* p, int block, double value) {
    const unsigned offset = shared_address(p), first = fibres::now->block / BLOCKS * BLOCKS;
    std::memcpy(reinterpret_cast<char*>((*fibres::groups)[first + block].shared.data()) + offset, &value, sizeof value);
}
inline fibres::Meeting& cluster() { return (*fibres::groups)[fibres::now->block / BLOCKS * BLOCKS].cluster; }
inline void arrive() { fibres::now->awaited = fibres::join(cluster()); }
inline void wait() { fibres::rest(cluster(), fibres::now->awaited); }
inline unsigned to_halves(float first, float second) {
    const _Float16 pair[2] = {static_cast<_Float16>(first), static_cast<_Float16>(second)};
    unsigned bits;
    return std::memcpy(&bits, pair, 4), bits;
}
inline float2 to_floats(unsigned bits) {
    _Float16 pair[2];
    std::memcpy(pair, &bits, 4);
    return {static_cast<float>(pair[0]), static_cast<float>(pair[1])};
}

inline double __shfl_xor_sync(unsigned, double value, int mask) {
    auto& exchanged = fibres::now->group->exchanged;
    const unsigned thread = fibres::now->thread;
    exchanged[thread][0] = value;
    fibres::meet_warp();
    const double found = exchanged[thread ^ mask][0];
    fibres::meet_warp();
    return found;
}

inline float __shfl_sync(unsigned, float value, int lane) {
    auto& exchanged = fibres::now->group->exchanged;
    const unsigned thread = fibres::now->thread;
    exchanged[thread][0] = value;
    fibres::meet_warp();
    const float found = static_cast<float>(exchanged[thread / 32 * 32 + lane][0]);
    fibres::meet_warp();
    return found;
}

inline void load_blocks(unsigned (&r)[4], unsigned address, bool transposed) {
    auto& exchanged = fibres::now->group->exchanged;
    const unsigned thread = fibres::now->thread, lane = thread % 32, first = thread - lane;
    exchanged[thread][0] = address;
    fibres::meet_warp();
    for (int i = 0; i < 4; ++i)
        for (unsigned half = 0; half < 2; ++half) {
            const unsigned row = transposed ? lane % 4 * 2 + half : lane / 4, column = transposed ? lane / 4 : lane % 4 * 2 + half;
            const unsigned start = static_cast<unsigned>(exchanged[first + 8 * i + row][0]);
            const char* from = reinterpret_cast<const char*>(dynamic_shared()) + start + column * 2;
            std::memcpy(reinterpret_cast<char*>(&r[i]) + 2 * half, from, 2);
        }
    fibres::meet_warp();
}
inline void load_matrices(unsigned (&r)[4], unsigned address) { load_blocks(r, address, false); }
inline void load_transposed(unsigned (&r)[4], unsigned address) { load_blocks(r, address, true); }

inline void multiply_add(float* c, const unsigned (&a)[4], unsigned b0, unsigned b1) {
    static float2 fragments[64][fibres::THREADS / 32][32][6];  // block, warp, lane
    const unsigned warp = fibres::now->thread / 32, lane = fibres::now->thread % 32;
    auto& own = fragments[fibres::now->block % 64][warp];
    const unsigned given[6] = {a[0], a[1], a[2], a[3], b0, b1};
    for (int i = 0; i < 6; ++i) own[lane][i] = to_floats(given[i]);
    fibres::meet_warp();
    const auto half = [](const float2& pair, int which) { return which ? pair.y : pair.x; };
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        float sum = c[i];
        for (int s = 0; s < 16; ++s)
            sum += half(own[row % 8 * 4 + s % 8 / 2][row / 8 + s / 8 * 2], s % 2) * half(own[column * 4 + s % 8 / 2][4 + s / 8], s % 2);
        c[i] = sum;
    }
    fibres::meet_warp();
}
