/* Runs a CUDA kernel on a CPU: every thread of a block is a fiber, and barriers and shuffles are where they wait.

   Blocks run one after the other, threads in ascending or descending order between two waits. What a GPU leaves
   undefined is refused: a barrier or shuffle that not all threads reach. Shared memory holds NaN when a block begins.
   Covers what attention.cu uses of CUDA, in the part of C that CUDA shares. */

#include <math.h>
#include <setjmp.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#define WARP_LANES 32
#define MOST_THREADS 1024
#define STACK_BYTES (128 * 1024)

#define __global__ static
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ static __attribute__((section("shared_memory")))
extern char __start_shared_memory[], __stop_shared_memory[];

typedef struct {
    unsigned x, y, z;
} dim3;

enum state { RUNNING, AT_BARRIER, AT_SHUFFLE, DONE };

struct fiber {
    ucontext_t start;
    jmp_buf resume;
    enum state state;
    int begun, turn, from;
    float offered[2];
};

static struct fiber fibers[MOST_THREADS];
static unsigned thread_count, current, descending;
static jmp_buf scheduler;
static void (*entry)(void **);
static void **entry_arguments;
static dim3 blockIdx, gridDim, threadIdx;

static void pause_fiber(enum state state) {
    fibers[current].state = state;
    if (!_setjmp(fibers[current].resume))
        _longjmp(scheduler, 1);
}

/* A fiber lives for the whole process, and begins the next block where it ended the last. */
static void fiber_main(void) {
    for (;;) {
        entry(entry_arguments);
        pause_fiber(DONE);
    }
}

static int run_fiber(unsigned thread) {
    struct fiber *fiber = &fibers[thread];
    current = thread;
    threadIdx.x = thread;
    fiber->state = RUNNING;
    if (_setjmp(scheduler))
        return 0;
    if (fiber->begun)
        _longjmp(fiber->resume, 1);
    fiber->begun = 1;
    if (getcontext(&fiber->start))
        return 1;
    fiber->start.uc_stack.ss_sp = malloc(STACK_BYTES);
    fiber->start.uc_stack.ss_size = STACK_BYTES;
    if (!fiber->start.uc_stack.ss_sp)
        return 1;
    makecontext(&fiber->start, fiber_main, 0);
    setcontext(&fiber->start);
    return 1;
}

static void __syncthreads(void) { pause_fiber(AT_BARRIER); }

/* Two cells in turn: a lane may offer its next number before the others have read this one. */
static float __shfl_xor_sync(unsigned lanes, float value, int mask) {
    struct fiber *own = &fibers[current];
    unsigned other = current ^ (unsigned)mask;
    int turn = own->turn;
    if (lanes != 0xffffffffu || mask >= WARP_LANES)
        abort();
    own->offered[turn] = value;
    own->turn = !turn;
    pause_fiber(AT_SHUFFLE);
    return fibers[other].offered[turn];
}

/* Runs the lanes of a warp until all are at a barrier or done; 0, or 1 when they are at different things. */
static int run_warp(unsigned first) {
    for (;;) {
        enum state state = RUNNING;
        for (unsigned i = 0; i < WARP_LANES; i++) {
            unsigned thread = first + (descending ? WARP_LANES - 1 - i : i);
            if (run_fiber(thread))
                return 1;
            if (state != RUNNING && fibers[thread].state != state)
                return 1;
            state = fibers[thread].state;
        }
        if (state != AT_SHUFFLE)
            return 0;
    }
}

static int run_block(void) {
    unsigned warps = thread_count / WARP_LANES;
    memset(__start_shared_memory, 0xff, (size_t)(__stop_shared_memory - __start_shared_memory));
    for (;;) {
        enum state state = RUNNING;
        for (unsigned i = 0; i < warps; i++) {
            unsigned first = (descending ? warps - 1 - i : i) * WARP_LANES;
            if (run_warp(first))
                return 1;
            if (state != RUNNING && fibers[first].state != state)
                return 1;
            state = fibers[first].state;
        }
        if (state == DONE)
            return 0;
    }
}

/* 0, or 1 when the threads of a block part where they must not. */
static int run_grid(void (*kernel)(void **), const unsigned *grid, unsigned threads, void **arguments) {
    if (threads == 0 || threads > MOST_THREADS || threads % WARP_LANES)
        return 1;
    entry = kernel;
    entry_arguments = arguments;
    thread_count = threads;
    gridDim = (dim3){grid[0], grid[1], grid[2]};
    for (blockIdx.z = 0; blockIdx.z < gridDim.z; blockIdx.z++)
        for (blockIdx.y = 0; blockIdx.y < gridDim.y; blockIdx.y++)
            for (blockIdx.x = 0; blockIdx.x < gridDim.x; blockIdx.x++)
                if (run_block())
                    return 1;
    return 0;
}

static inline unsigned __float_as_uint(float value) {
    unsigned bits;
    memcpy(&bits, &value, 4);
    return bits;
}

static inline float __uint_as_float(unsigned bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline float widen_one_half(unsigned half) {
    unsigned sign = (half & 0x8000) << 16, exponent = half >> 10 & 31, fraction = half & 1023;
    float value;
    if (exponent == 31)
        return __uint_as_float(sign | 0x7f800000u | fraction << 13);
    if (exponent == 0)
        value = ldexpf((float)fraction, -24);
    else
        value = ldexpf((float)(1024 + fraction), (int)exponent - 25);
    return sign ? -value : value;
}

/* To nearest, ties to even. */
static inline unsigned narrow_one_half(float value) {
    unsigned sign = __float_as_uint(value) >> 16 & 0x8000;
    float size = fabsf(value);
    int exponent;
    if (value != value)
        return 0x7fff;
    if (size >= 65520.0f)
        return sign | 0x7c00;
    frexpf(size, &exponent);
    if (size < 0x1p-14f)
        return sign | (unsigned)lrintf(ldexpf(size, 24));
    return sign | ((unsigned)(exponent + 13) * 1024 + (unsigned)lrintf(ldexpf(size, 11 - exponent)));
}

static inline void widen_half(unsigned pair, float *low, float *high) {
    *low = widen_one_half(pair & 0xffff);
    *high = widen_one_half(pair >> 16);
}

static inline unsigned narrow_half(float low, float high) { return narrow_one_half(low) | narrow_one_half(high) << 16; }
