/* The kernels of attention.cu as functions of a shared library. */

#include "cpu_cuda.h"

#include ATTENTION_CU

#define POINTER(type, i) (*(type **)arguments[i])
#define NUMBER(i) (*(int *)arguments[i])

static void run_append(void **arguments) {
    append(POINTER(const vector, 0), POINTER(const vector, 1), POINTER(const int, 2), POINTER(const int, 3), NUMBER(4),
           NUMBER(5), POINTER(vector, 6), POINTER(vector, 7));
}

static void run_attend(void **arguments) {
    attend(POINTER(const vector, 0), POINTER(const vector, 1), POINTER(const vector, 2), POINTER(const int, 3),
           POINTER(const int, 4), NUMBER(5), NUMBER(6), NUMBER(7), NUMBER(8), POINTER(word, 9), POINTER(float, 10));
}

static void run_combine(void **arguments) {
    combine(POINTER(const float, 0), POINTER(const int, 1), NUMBER(2), NUMBER(3), NUMBER(4), NUMBER(5),
            POINTER(word, 6));
}

/* 0; 1: the threads of a block parted; 2: there is no such kernel. `backwards`: threads run in descending order. */
int launch(const char *kernel, const unsigned *grid, unsigned threads, void **arguments, unsigned backwards) {
    descending = backwards;
    if (!strcmp(kernel, "append"))
        return run_grid(run_append, grid, threads, arguments);
    if (!strcmp(kernel, "attend"))
        return run_grid(run_attend, grid, threads, arguments);
    if (!strcmp(kernel, "combine"))
        return run_grid(run_combine, grid, threads, arguments);
    return 2;
}

/* For tests of the conversions themselves. */
unsigned narrow_pair(float low, float high) { return narrow_half(low, high); }
