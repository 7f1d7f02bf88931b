/* What the machine can do at best: every ceiling the suites divide by, in one file without dependencies.
 *
 * Built as a library (bench/ceilings.py, in process) and as a program (whole processes):
 *   ceiling read METHOD THREADS < ranges     ranges: lines "offset bytes path"; prints the sum of all 64-bit words
 *   ceiling launch REPORT COMMAND...         runs COMMAND, writes "seconds peak_rss_bytes status" to REPORT
 *
 * Every byte is read by the same loop, that of kernels/native/words.h.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "../../kernels/native/words.h"

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22 /* Linux 5.14; older headers lack it */
#endif
#define PAGE 4096
#define MAX_THREADS 64

typedef struct {
    int file;   /* descriptor */
    char *base; /* where byte 0 is mapped, or NULL */
    uint64_t offset, nbytes;
} Range;

typedef struct Job Job;
typedef uint64_t (*Method)(const Job *, const Range *, void *buffer);

struct Job {
    const Range *pieces;
    size_t count;
    Method method;
    size_t buffer_bytes;
    atomic_size_t next;
    atomic_int error;
    _Atomic uint64_t sum;
};

static void fail(const Job *job, int error) { atomic_store(&((Job *)job)->error, error); }

static uint64_t of_memory(const Job *job, const Range *piece, void *buffer) {
    (void)job, (void)buffer;
    return llmfp_sum_words(piece->base + piece->offset, piece->nbytes);
}

/* Pages of the page cache without a copy, mapped in one call per piece, and either kept (fastest, unbounded resident
 * set) or given back behind the cursor. */
static uint64_t populated(const Job *job, const Range *piece, int release) {
    uint64_t start = piece->offset / PAGE * PAGE, nbytes = piece->offset + piece->nbytes - start;
    if (madvise(piece->base + start, nbytes, MADV_POPULATE_READ)) return fail(job, errno), 0;
    uint64_t sum = llmfp_sum_words(piece->base + piece->offset, piece->nbytes);
    if (release) madvise(piece->base + start, nbytes, MADV_DONTNEED);
    return sum;
}

static uint64_t of_map(const Job *job, const Range *piece, void *buffer) {
    (void)buffer;
    return populated(job, piece, 0);
}

static uint64_t of_release(const Job *job, const Range *piece, void *buffer) {
    (void)buffer;
    return populated(job, piece, 1);
}

static int read_fully(int file, char *buffer, uint64_t nbytes, uint64_t offset, uint64_t wanted) {
    for (uint64_t done = 0; done < wanted;) {
        ssize_t got = pread(file, buffer + done, nbytes - done, (off_t)(offset + done));
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) return got < 0 ? errno : EIO;
        done += (uint64_t)got;
    }
    return 0;
}

static uint64_t of_pread(const Job *job, const Range *piece, void *buffer) {
    int error = read_fully(piece->file, buffer, piece->nbytes, piece->offset, piece->nbytes);
    return error ? fail(job, error), 0 : llmfp_sum_words(buffer, piece->nbytes);
}

/* O_DIRECT: whole blocks around the piece; only the piece is summed. The last block of a file comes back short. */
static uint64_t of_direct(const Job *job, const Range *piece, void *buffer) {
    uint64_t start = piece->offset / PAGE * PAGE, used = piece->offset - start + piece->nbytes;
    int error = read_fully(piece->file, buffer, (used + PAGE - 1) / PAGE * PAGE, start, used);
    return error ? fail(job, error), 0 : llmfp_sum_words((char *)buffer + (piece->offset - start), piece->nbytes);
}

static void *work(void *argument) {
    Job *job = argument;
    void *buffer = NULL;
    if (job->buffer_bytes && posix_memalign(&buffer, PAGE, job->buffer_bytes + 2 * PAGE)) fail(job, ENOMEM);
    uint64_t sum = 0;
    for (size_t i; !job->error && (i = atomic_fetch_add(&job->next, 1)) < job->count;)
        sum += job->method(job, &job->pieces[i], buffer);
    atomic_fetch_add(&job->sum, sum);
    free(buffer);
    return NULL;
}

static int run(Job *job, int threads, uint64_t *sum) {
    pthread_t thread[MAX_THREADS];
    threads = threads < 1 ? 1 : threads > MAX_THREADS ? MAX_THREADS : threads;
    for (int i = 1; i < threads; i++)
        if (pthread_create(&thread[i], NULL, work, job)) return EAGAIN;
    work(job);
    for (int i = 1; i < threads; i++) pthread_join(thread[i], NULL);
    *sum = job->sum;
    return job->error;
}

/* Ranges cut into pieces of at most `nbytes` each. The caller frees. */
static Range *cut(const Range *range, size_t count, uint64_t nbytes, size_t *pieces) {
    size_t total = 0;
    for (size_t i = 0; i < count; i++) total += (range[i].nbytes + nbytes - 1) / nbytes;
    Range *piece = malloc((total + 1) * sizeof *piece);
    *pieces = 0;
    for (size_t i = 0; piece && i < count; i++)
        for (uint64_t done = 0; done < range[i].nbytes; done += nbytes) {
            uint64_t left = range[i].nbytes - done;
            piece[(*pieces)++] = (Range){range[i].file, range[i].base, range[i].offset + done, left < nbytes ? left : nbytes};
        }
    return piece;
}

/* The memory read ceiling: sum of all words of a buffer. */
uint64_t ceiling_memory(const void *data, uint64_t nbytes, int threads) {
    Range whole = {-1, (char *)data, 0, nbytes};
    size_t count;
    Range *pieces = cut(&whole, 1, 8 << 20, &count);
    Job job = {.pieces = pieces, .count = count, .method = of_memory};
    uint64_t sum = 0;
    run(&job, threads, &sum);
    free(pieces);
    return sum;
}

/* The arithmetic ceiling of any kernel: what the sums alone take. Four rows of 512 floats in the first-level cache are
 * summed `repetitions` times, x and x^2, by row and by column, and with `weighted` gain * x and its square by row too.
 * Returns the sum of all squares by column. */
typedef float Floats __attribute__((vector_size(64), may_alias));

#define SUMS(WEIGHTED)                                                                                                 \
    for (uint64_t again = 0; again < repetitions; again++) {                                                           \
        for (int r = 0; r < 4; r++) row[r] = row_square[r] = weighted_row[r] = weighted_square[r] = zero;              \
        for (int v = 0; v < 32; v++) {                                                                                 \
            Floats s = sum[v], q = square[v];                                                                          \
            _Pragma("GCC unroll 4") for (int r = 0; r < 4; r++) {                                                      \
                const Floats x = rows[32 * r + v];                                                                     \
                s += x, q += x * x, row[r] += x, row_square[r] += x * x;                                               \
                if (WEIGHTED) {                                                                                        \
                    const Floats t = x * gain[v];                                                                      \
                    weighted_row[r] += t, weighted_square[r] += t * t;                                                 \
                }                                                                                                      \
            }                                                                                                          \
            sum[v] = s, square[v] = q;                                                                                 \
        }                                                                                                              \
        for (int r = 0; r < 4; r++)                                                                                    \
            all_rows[r] += row[r] + row_square[r] + weighted_row[r] + weighted_square[r];                              \
        if (again % 32 == 31 || again + 1 == repetitions)                                                              \
            for (int v = 0; v < 32; v++) {                                                                             \
                for (int l = 0; l < 16; l++) total += square[v][l];                                                    \
                sum[v] = square[v] = zero;                                                                             \
            }                                                                                                          \
    }

double ceiling_sums(const Floats *given_rows, const Floats *given_gain, int weighted, uint64_t repetitions) {
    /* Laid out here: loads that a page's length and a little more lie behind a store would wait for it, by chance. */
    struct {
        Floats rows[4 * 32], gain[32], sum[32], square[32];
    } __attribute__((aligned(4096))) at = {0};
    const Floats zero = {0}, *const rows = at.rows, *const gain = at.gain;
    Floats *const sum = at.sum, *const square = at.square;
    Floats row[4], row_square[4], weighted_row[4], weighted_square[4], all_rows[4] = {{0}};
    double total = 0;
    memcpy(at.rows, given_rows, sizeof at.rows), memcpy(at.gain, given_gain, sizeof at.gain);
    if (weighted) {
        SUMS(1)
    } else {
        SUMS(0)
    }
    __asm__ volatile("" : : "m"(all_rows), "m"(at)); /* every sum is wanted */
    return total;
}

static const struct {
    const char *name;
    Method method;
    uint64_t piece_bytes;
    int flags, mapped;
} METHODS[] = {
    {"map", of_map, 8 << 20, 0, 1},
    {"release", of_release, 8 << 20, 0, 1},
    {"pread", of_pread, 512 << 10, 0, 0},       /* a copy that stays in the core's own cache */
    {"cat", of_pread, 128 << 10, 0, 0},         /* what cat(1) does: 128 KiB at a time, announced as sequential */
    {"direct", of_direct, 8 << 20, O_DIRECT, 0}, /* past the page cache */
};

static int main_read(int argc, char **argv) {
    size_t m = 0, methods = sizeof METHODS / sizeof *METHODS, count = 0, capacity = 0, pieces;
    while (m < methods && (argc < 4 || strcmp(argv[2], METHODS[m].name))) m++;
    if (m == methods) return fprintf(stderr, "usage: ceiling read map|release|pread|cat|direct THREADS < ranges\n"), 2;
    Range *range = NULL;
    unsigned long long offset, nbytes;
    char path[4096], opened[4096] = "", *base = NULL;
    int file = -1;
    while (scanf("%llu %llu %4095[^\n]", &offset, &nbytes, path) == 3) {
        if (strcmp(path, opened)) {
            if ((file = open(path, O_RDONLY | METHODS[m].flags)) < 0) return perror(path), 2;
            if (!strcmp(METHODS[m].name, "cat")) posix_fadvise(file, 0, 0, POSIX_FADV_SEQUENTIAL);
            size_t size = (size_t)lseek(file, 0, SEEK_END);
            if (METHODS[m].mapped && (base = mmap(NULL, size, PROT_READ, MAP_SHARED, file, 0)) == MAP_FAILED)
                return perror(path), 2;
            strcpy(opened, path);
        }
        if (count == capacity && !(range = realloc(range, (capacity = 2 * capacity + 64) * sizeof *range))) return 2;
        range[count++] = (Range){file, base, offset, nbytes};
    }
    Range *piece = cut(range, count, METHODS[m].piece_bytes, &pieces);
    Job job = {.pieces = piece,
               .count = pieces,
               .method = METHODS[m].method,
               .buffer_bytes = METHODS[m].mapped ? 0 : METHODS[m].piece_bytes};
    uint64_t sum = 0;
    int error = run(&job, atoi(argv[3]), &sum);
    if (error) return fprintf(stderr, "ceiling read: %s\n", strerror(error)), 1;
    printf("%llu\n", (unsigned long long)sum);
    return 0;
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Times a whole process. This program is small, so that the peak a child inherits at fork (1 MiB) hides nothing. */
static int main_launch(int argc, char **argv) {
    if (argc < 4) return fprintf(stderr, "usage: ceiling launch REPORT COMMAND...\n"), 2;
    double start = now();
    pid_t child = vfork();
    if (child == 0) {
        execvp(argv[3], argv + 3);
        _exit(127);
    }
    int status;
    struct rusage usage;
    if (child < 0 || wait4(child, &status, 0, &usage) < 0) return perror("launch"), 2;
    double seconds = now() - start;
    FILE *report = fopen(argv[2], "w");
    if (!report) return perror(argv[2]), 2;
    int code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    fprintf(report, "%.9f %lld %d\n", seconds, (long long)usage.ru_maxrss * 1024, code);
    return fclose(report) ? 2 : 0;
}

int main(int argc, char **argv) {
    if (argc > 1 && !strcmp(argv[1], "read")) return main_read(argc, argv);
    if (argc > 1 && !strcmp(argv[1], "launch")) return main_launch(argc, argv);
    return fprintf(stderr, "usage: ceiling read|launch ...\n"), 2;
}
