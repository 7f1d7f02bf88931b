// llmfp._native: the Python side of the CPU kernel. Checks every argument, allocates everything, releases the GIL and
// calls the SIMD level in use. No NumPy, no torch: buffers in, bytes out.
//
// Mapped files can shrink under the reader, which the system reports as SIGBUS. Work on caller's memory runs under a
// guard that turns it into OSError; only plain C++ without destructors runs there, so the jump out skips nothing.

#include "pages.hpp" // with Python.h, which comes first

#include "job.hpp"
#include "words.h"

#include <cerrno>
#include <cfenv>
#include <csetjmp>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <vector>

namespace llmfp {
namespace {

// ------------------------------------------------------------------------------------------------------- SIMD levels

// Best first; null where this build or this machine lacks one.
constexpr size_t LEVELS = 4;

const Level *const *levels() {
    static const Level *available[LEVELS];
    static const bool filled = [] {
        size_t n = 0;
#if defined(__x86_64__)
        const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                          __builtin_cpu_supports("f16c");
        const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
        if (avx512_level && avx512) available[n++] = avx512_level;
        if (avx2_level && avx2) available[n++] = avx2_level;
#endif
        if (neon_level) available[n++] = neon_level;
        available[n++] = scalar_level;
        return true;
    }();
    (void)filled;
    return available;
}

const Level *level_named(const char *name) {
    for (size_t i = 0; i < LEVELS && levels()[i]; i++)
        if (!strcmp(levels()[i]->name, name)) return levels()[i];
    PyErr_Format(PyExc_ValueError, "SIMD level %s is unknown or cannot run here", name);
    return nullptr;
}

// ------------------------------------------------------------------------------------------------------------- guard

struct Guard {
    sigjmp_buf out;
    uintptr_t begin, end;
};

// initial-exec: a handler must not be the first to touch, and so allocate, a thread's lazily made variables.
__attribute__((tls_model("initial-exec"))) thread_local Guard *guard = nullptr;

struct sigaction previous_action;

void on_sigbus(int number, siginfo_t *info, void *context) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(info->si_addr);
    if (Guard *g = guard; g && at >= g->begin && at < g->end) siglongjmp(g->out, 1);
    // Not ours: what would have happened without us. A default or ignored SIGBUS faults again and ends the process.
    if (previous_action.sa_flags & SA_SIGINFO) return previous_action.sa_sigaction(number, info, context);
    if (previous_action.sa_handler != SIG_DFL && previous_action.sa_handler != SIG_IGN)
        return previous_action.sa_handler(number);
    sigaction(SIGBUS, &previous_action, nullptr);
    if (info->si_code <= 0) raise(number); // sent by kill(), not by a fault: would not come again by itself
}

void install_handler() {
    static std::once_flag once;
    std::call_once(once, [] {
        struct sigaction action;
        memset(&action, 0, sizeof action);
        action.sa_sigaction = on_sigbus;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        sigemptyset(&action.sa_mask);
        sigaction(SIGBUS, &action, &previous_action);
    });
}

// False when a page of [begin, begin + nbytes) turned out not to exist. `work` must own nothing with a destructor.
__attribute__((noinline)) bool guarded(const void *begin, size_t nbytes, void (*work)(void *), void *argument) {
    constexpr uintptr_t PAGE = 1 << 16; // the largest page anywhere; a fault may be reported at the page's start
    Guard mine;
    mine.begin = reinterpret_cast<uintptr_t>(begin) / PAGE * PAGE;
    mine.end = (reinterpret_cast<uintptr_t>(begin) + nbytes + PAGE - 1) / PAGE * PAGE;
    if (sigsetjmp(mine.out, 1)) {
        guard = nullptr;
        return false;
    }
    guard = &mine;
    work(argument);
    guard = nullptr;
    return true;
}

PyObject *vanished() {
    PyObject *args = Py_BuildValue("(is)", EIO, "mapped file shrank or disappeared while it was read");
    if (args) PyErr_SetObject(PyExc_OSError, args);
    Py_XDECREF(args);
    return nullptr;
}

// ----------------------------------------------------------------------------------------------------------- buffers

// A borrowed contiguous buffer.
struct View {
    Py_buffer buffer{};
    View() = default;
    View(const View &) = delete;
    ~View() { PyBuffer_Release(&buffer); }
    bool open(PyObject *object, int flags = PyBUF_SIMPLE) { return PyObject_GetBuffer(object, &buffer, flags) == 0; }
    const unsigned char *bytes() const { return static_cast<const unsigned char *>(buffer.buf); }
    size_t size() const { return static_cast<size_t>(buffer.len); }
    double at(size_t i) const {
        double x;
        memcpy(&x, bytes() + 8 * i, 8);
        return x;
    }
};

// A new bytes object of n float64; `data` is where they go. Written without the GIL, before anyone else sees it.
struct Doubles {
    PyObject *object = nullptr;
    double *data = nullptr;
    Doubles() = default;
    Doubles(const Doubles &) = delete;
    ~Doubles() { Py_XDECREF(object); }
    bool make(size_t n) {
        object = PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(8 * n));
        if (object) data = reinterpret_cast<double *>(PyBytes_AS_STRING(object));
        return object != nullptr;
    }
    // The object, or None where none was made; the caller's from then on.
    PyObject *give() {
        PyObject *given = object ? object : Py_NewRef(Py_None);
        object = nullptr;
        return given;
    }
};

PyObject *pair(Doubles &mean, Doubles &m2) {
    return Py_BuildValue("(NN)", mean.give(), m2.give());
}

PyObject *refuse(const char *why) {
    PyErr_SetString(PyExc_ValueError, why);
    return nullptr;
}

struct Owned {
    PyObject *object;
    ~Owned() { Py_XDECREF(object); }
};

double canonical(double x) { return x == x ? x : __builtin_nan(""); }

// --------------------------------------------------------------------------------------------------------- marginals

struct Name {
    const char *name;
    Dtype dtype;
};
constexpr Name DTYPES[] = {{"BF16", Dtype::BF16}, {"F16", Dtype::F16},         {"F32", Dtype::F32},
                           {"F64", Dtype::F64},   {"F8_E4M3", Dtype::F8_E4M3}, {"F8_E5M2", Dtype::F8_E5M2}};

// The buffers that Coding and LowRank of a call point into.
struct Beside {
    View table, scale, zero, shift, row_group, col_group, left, right;
};

// An optional buffer of at least (or, with `exactly`, of) n items of 4 bytes, aligned to them.
bool open_words(PyObject *object, View &view, size_t n, bool exactly, const char *what) {
    if (object == Py_None) return true;
    if (!view.open(object)) return false;
    if (view.size() % 4 || view.size() / 4 < n || (exactly && view.size() / 4 != n) ||
        reinterpret_cast<uintptr_t>(view.bytes()) % 4) {
        PyErr_Format(PyExc_ValueError, "%s has the wrong size or alignment", what);
        return false;
    }
    return true;
}

template <class T> const T *pointer(const View &view) {
    return view.buffer.obj ? reinterpret_cast<const T *>(view.bytes()) : nullptr;
}

bool all_below(const int32_t *index, size_t from, size_t to, size_t limit) {
    for (size_t i = from; i < to; i++)
        if (index[i] < 0 || static_cast<size_t>(index[i]) >= limit) return false;
    return true;
}

struct PackingName {
    const char *name;
    Packing packing;
};
constexpr PackingName PACKINGS[] = {{"row", Packing::ROW},
                                    {"row_high", Packing::ROW_HIGH},
                                    {"down", Packing::DOWN},
                                    {"awq", Packing::AWQ},
                                    {"plane", Packing::PLANE}};
struct LevelsName {
    const char *name;
    Levels levels;
    size_t most_bits;
};
constexpr LevelsName LEVELS_OF_CODES[] = {{"uint", Levels::UINT, 8},       {"int", Levels::INT, 8},
                                          {"offset", Levels::OFFSET, 8},   {"F8_E4M3", Levels::F8_E4M3, 8},
                                          {"F8_E5M2", Levels::F8_E5M2, 8}, {"E2M1", Levels::TABLE, 4},
                                          {"table", Levels::TABLE, 4}};
constexpr float E2M1[16] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.f, -0.5f, -1, -1.5f, -2, -3, -4, -6};

struct GgmlType {
    const char *name;
    Ggml type;
    size_t cols, bytes, grid_bytes;
};
constexpr GgmlType GGML_TYPES[] = {
#define LLMFP_GGML(NAME, COLS, BYTES, POINTS) {#NAME, Ggml::NAME, COLS, BYTES, POINTS},
#include "ggml_types.inc"
#undef LLMFP_GGML
};

// No size here may come near where a product of two overflows.
constexpr Py_ssize_t LARGEST = Py_ssize_t(1) << 31;

// A ggml block type; bytes of a stored row of `stop` columns.
bool read_ggml(const GgmlType &type, PyObject *table, const Job &job, size_t stop, Coding &c, Beside &beside,
               size_t &row_bytes) {
    c.packing = Packing::GGML, c.ggml = type.type, c.block_cols = type.cols, c.block_bytes = type.bytes;
    if (job.first_col % type.cols || job.cols % type.cols) return refuse("columns must be whole blocks") != nullptr;
    row_bytes = stop / type.cols * type.bytes;
    if (!type.grid_bytes) return true;
    if (table == Py_None) return refuse("this type needs its grid") != nullptr;
    if (!beside.table.open(table)) return false;
    if (beside.table.size() != type.grid_bytes) return refuse("the grid has the wrong size") != nullptr;
    c.grid = pointer<int8_t>(beside.table);
    return true;
}

// job.coding from a llmfp.marginals.Coding as a tuple of its fields in order; bytes of data that the chunk takes.
bool read_coding(PyObject *tuple, Job &job, Beside &beside, size_t &end) {
    const char *packing_name, *levels_name;
    PyObject *table, *scale, *zero, *shift, *row_group, *col_group;
    Py_ssize_t bits, place, scale_rows, scale_cols, row_block, col_block, flat_block, tensor_cols;
    if (!PyArg_ParseTuple(tuple, "snnsOOOOnnnnnOOn:coding", &packing_name, &bits, &place, &levels_name, &table, &scale,
                          &zero, &shift, &scale_rows, &scale_cols, &row_block, &col_block, &flat_block, &row_group,
                          &col_group, &tensor_cols))
        return false;
    Coding &c = job.coding;
    const size_t stop = job.first_col + job.cols, rows_stop = job.first_row + job.rows;
    size_t stored_rows = job.rows, row_bytes = 0;
    const GgmlType *block = nullptr;
    for (const GgmlType &each : GGML_TYPES)
        if (!strcmp(each.name, packing_name)) block = &each;
    if (block) {
        if (!read_ggml(*block, table, job, stop, c, beside, row_bytes)) return false;
    } else {
        const PackingName *packing = nullptr;
        for (const PackingName &each : PACKINGS)
            if (!strcmp(each.name, packing_name)) packing = &each;
        const LevelsName *levels = nullptr;
        for (const LevelsName &each : LEVELS_OF_CODES)
            if (!strcmp(each.name, levels_name)) levels = &each;
        if (!packing || !levels) return refuse("unknown packing or levels") != nullptr;
        if (bits < 1 || bits > 8 || place < 0 || place + bits > 8) return refuse("bits must be 1 to 8") != nullptr;
        c.packing = packing->packing, c.levels = levels->levels;
        c.bits = static_cast<size_t>(bits), c.place = static_cast<size_t>(place);
        const bool four = c.packing == Packing::ROW_HIGH || c.packing == Packing::AWQ || !strcmp(levels_name, "E2M1");
        const bool eight = c.levels == Levels::F8_E4M3 || c.levels == Levels::F8_E5M2;
        if ((four && bits != 4) || (eight && bits != 8) || c.bits > levels->most_bits)
            return refuse("this packing, or these levels, have another number of bits") != nullptr;
        if (c.levels == Levels::TABLE) {
            const size_t entries = size_t(1) << bits;
            if (!strcmp(levels_name, "E2M1")) {
                memcpy(c.table, E2M1, sizeof E2M1);
            } else {
                if (!open_words(table, beside.table, entries, true, "table")) return false;
                if (table == Py_None) return refuse("table is missing") != nullptr;
                memcpy(c.table, beside.table.bytes(), 4 * entries);
            }
        }
        for (Py_ssize_t n : {scale_rows, scale_cols, row_block, col_block})
            if (n < 1 || n > LARGEST) return refuse("scale_rows, scale_cols and blocks must be at least 1") != nullptr;
        if (flat_block < 0 || flat_block > LARGEST || tensor_cols < 0 || tensor_cols > LARGEST)
            return refuse("flat_block or tensor_cols out of range") != nullptr;
        c.scale_rows = static_cast<size_t>(scale_rows), c.scale_cols = static_cast<size_t>(scale_cols);
        c.row_block = static_cast<size_t>(row_block), c.col_block = static_cast<size_t>(col_block);
        c.flat_block = static_cast<size_t>(flat_block), c.tensor_cols = static_cast<size_t>(tensor_cols);
        const size_t entries = c.scale_rows * c.scale_cols;
        if (scale == Py_None) return refuse("scale is missing") != nullptr;
        if (!open_words(scale, beside.scale, entries, true, "scale") ||
            !open_words(zero, beside.zero, entries, true, "zero") ||
            !open_words(shift, beside.shift, entries, true, "shift") ||
            !open_words(row_group, beside.row_group, rows_stop, false, "row_group") ||
            !open_words(col_group, beside.col_group, stop, false, "col_group"))
            return false;
        c.scale = pointer<float>(beside.scale), c.zero = pointer<float>(beside.zero);
        c.shift = pointer<float>(beside.shift);
        c.row_group = pointer<int32_t>(beside.row_group), c.col_group = pointer<int32_t>(beside.col_group);
        if (c.zero && c.shift) return refuse("zero and shift exclude each other") != nullptr;
        if (c.flat_block) {
            if (c.tensor_cols < stop || ((rows_stop - 1) * c.tensor_cols + stop - 1) / c.flat_block >= entries)
                return refuse("flat_block leads beyond the scales") != nullptr;
        } else if (c.row_group ? !all_below(c.row_group, job.first_row, rows_stop, c.scale_rows) : false) {
            return refuse("row_group leads beyond the scales") != nullptr;
        } else if (c.col_group ? !all_below(c.col_group, job.first_col, stop, c.scale_cols)
                               : (stop - 1) / c.col_block >= c.scale_cols) {
            return refuse("columns lead beyond the scales") != nullptr;
        }
        if (c.packing == Packing::DOWN) stored_rows = (job.rows * c.bits + 31) / 32, row_bytes = 4 * stop;
        else if (c.packing == Packing::AWQ) row_bytes = (stop + 7) / 8 * 4;
        else if (c.packing == Packing::PLANE) row_bytes = stop;
        else row_bytes = (stop * c.bits + 7) / 8;
    }
    if (stored_rows > 1 && job.row_stride < row_bytes) return refuse("row_stride_bytes is shorter than a row") != nullptr;
    if (__builtin_mul_overflow(stored_rows - 1, job.row_stride, &end) || __builtin_add_overflow(end, row_bytes, &end))
        return refuse("rows and columns reach beyond the end of the buffer") != nullptr;
    job.has_coding = true;
    return true;
}

// job's low-rank term from a llmfp.marginals.LowRank as a tuple of its fields in order.
bool read_low_rank(PyObject *tuple, Job &job, Beside &beside) {
    Py_ssize_t rank;
    PyObject *left, *right;
    if (!PyArg_ParseTuple(tuple, "nOO:low_rank", &rank, &left, &right)) return false;
    if (rank < 1 || rank > LARGEST) return refuse("rank must be at least 1") != nullptr;
    job.rank = static_cast<size_t>(rank);
    if (!beside.left.open(left) || !beside.right.open(right)) return false;
    const size_t rows = beside.left.size() / 4 / job.rank;
    job.right_cols = beside.right.size() / 4 / job.rank;
    job.left = pointer<float>(beside.left), job.right = pointer<float>(beside.right);
    if (rows < job.first_row + job.rows || job.right_cols < job.first_col + job.cols ||
        beside.right.size() != 4 * job.rank * job.right_cols || reinterpret_cast<uintptr_t>(job.left) % 4 ||
        reinterpret_cast<uintptr_t>(job.right) % 4)
        return refuse("left or right has the wrong size or alignment") != nullptr;
    return true;
}

struct Freed {
    void *memory;
    ~Freed() { free(memory); }
};

// Weights this far from 1 would push float32 squares out of range.
bool extreme(const float *weight, size_t n) {
    for (size_t i = 0; i < n; i++) {
        const float magnitude = weight[i] < 0 ? -weight[i] : weight[i];
        if (!(magnitude <= 0x1p60f) || (magnitude > 0 && magnitude < 0x1p-50f)) return true;
    }
    return false;
}

struct Run {
    const Level *level;
    Job job;
};

void run_marginals(void *argument) {
    Run *each = static_cast<Run *>(argument);
    each->level->marginals(&each->job);
}

void run_expand(void *argument) {
    Run *each = static_cast<Run *>(argument);
    each->level->expand(&each->job);
}

// Float32 exactly as IEEE 754 has it (another library may have set flush-to-zero), whatever the thread's state was.
bool run_guarded(Run &each, size_t nbytes, void (*work)(void *)) {
    fenv_t state;
    fegetenv(&state);
    fesetenv(FE_DFL_ENV);
    const bool whole = guarded(each.job.data, nbytes, work, &each);
    fesetenv(&state);
    return whole;
}

// A llmfp.marginals.Chunk in the order (level, data, dtype, rows, cols, offset_bytes, row_stride_bytes, unit_rows,
// col_weight, row_weight, cross, coding, low_rank, first_row, first_col); coding and low_rank are tuples of their fields.
struct Input {
    Run each;
    Beside beside;
    View data, col_weight, row_weight;
    size_t nbytes; // from the first element's byte to behind the last

    bool read(PyObject *tuple) {
        PyObject *data_object, *col_weight_object, *row_weight_object, *coding_object, *low_rank_object;
        const char *level_name, *dtype_name;
        Py_ssize_t rows, cols, offset, stride, unit_rows, first_row, first_col;
        int cross;
        if (!PyArg_ParseTuple(tuple, "sOsnnnnnOOpOOnn:chunk", &level_name, &data_object, &dtype_name, &rows, &cols,
                              &offset, &stride, &unit_rows, &col_weight_object, &row_weight_object, &cross,
                              &coding_object, &low_rank_object, &first_row, &first_col))
            return false;
        each.level = level_named(level_name);
        if (!each.level) return false;
        const Name *known = nullptr;
        for (const Name &name : DTYPES)
            if (!strcmp(name.name, dtype_name)) known = &name;
        const bool coded = coding_object != Py_None;
        if (!known && !coded) return PyErr_Format(PyExc_ValueError, "unknown dtype %s", dtype_name) != nullptr;
        if (!data.open(data_object)) return false;
        if (rows < 1 || cols < 1 || unit_rows < 1) return refuse("rows, cols and unit_rows must be at least 1") != nullptr;
        if (offset < 0 || stride < 0) return refuse("offset_bytes and row_stride_bytes must not be negative") != nullptr;
        if (first_row < 0 || first_col < 0) return refuse("first_row and first_col must not be negative") != nullptr;
        if (coded || low_rank_object != Py_None)
            for (Py_ssize_t n : {rows, cols, first_row, first_col})
                if (n > LARGEST / 2) return refuse("too many rows or columns") != nullptr;
        const size_t n_cols = static_cast<size_t>(cols), n_rows = static_cast<size_t>(rows);
        Job &job = each.job;
        memset(&job, 0, sizeof job);
        job.rows = n_rows, job.cols = n_cols;
        job.row_stride = static_cast<size_t>(stride), job.unit_rows = static_cast<size_t>(unit_rows);
        job.first_row = static_cast<size_t>(first_row), job.first_col = static_cast<size_t>(first_col);
        job.cross = cross;
        // The last element must end inside the buffer; each step is checked before it can overflow.
        size_t last_row, row_bytes, end;
        if (coded) {
            if (!read_coding(coding_object, job, beside, nbytes)) return false;
        } else {
            job.dtype = known->dtype;
            if (__builtin_mul_overflow(n_cols, itemsize(known->dtype), &row_bytes) ||
                __builtin_mul_overflow(n_rows - 1, job.row_stride, &last_row) ||
                __builtin_add_overflow(last_row, row_bytes, &nbytes))
                return refuse("rows and columns reach beyond the end of the buffer") != nullptr;
            if (rows > 1 && job.row_stride < row_bytes)
                return refuse("row_stride_bytes is shorter than a row") != nullptr;
        }
        if (__builtin_add_overflow(nbytes, static_cast<size_t>(offset), &end) || end > data.size())
            return refuse("rows and columns reach beyond the end of the buffer") != nullptr;
        job.data = data.bytes() + offset;
        if (low_rank_object != Py_None && !read_low_rank(low_rank_object, job, beside)) return false;
        if (col_weight_object != Py_None && row_weight_object != Py_None)
            return refuse("col_weight and row_weight exclude each other") != nullptr;
        if (cross && row_weight_object != Py_None)
            return refuse("cross and row_weight exclude each other") != nullptr;
        if (col_weight_object != Py_None && !col_weight.open(col_weight_object)) return false;
        if (row_weight_object != Py_None && !row_weight.open(row_weight_object)) return false;
        if (col_weight.buffer.obj && col_weight.size() != 4 * n_cols)
            return refuse("col_weight is not float32[cols]") != nullptr;
        if (row_weight.buffer.obj && row_weight.size() != 4 * n_rows)
            return refuse("row_weight is not float32[rows]") != nullptr;
        return true;
    }
};

// marginals(chunk): row mean and M2, column mean and M2, weighted mean and M2 (of rows under col_weight, of columns under
// row_weight, else None twice), cross or None, abs_max, nonfinite.
PyObject *py_marginals(PyObject *, PyObject *tuple) {
    Input input;
    if (!input.read(tuple)) return nullptr;
    Job &job = input.each.job;
    const View &col_weight = input.col_weight, &row_weight = input.row_weight;
    const size_t n_rows = job.rows, n_cols = job.cols;

    const size_t units = (n_rows - 1) / job.unit_rows + 1;
    size_t entries;
    if (__builtin_mul_overflow(units, n_cols, &entries) || entries > PY_SSIZE_T_MAX / 16) return PyErr_NoMemory();
    const size_t row_weight_bytes = (row_weight.buffer.obj ? 4 * n_rows + 63 : 0) / 64 * 64;
    unsigned char *memory = static_cast<unsigned char *>(
        aligned_alloc(64, SCRATCH_BYTES_PER_COLUMN * padded(n_cols) + STAGE_BYTES + row_weight_bytes));
    if (!memory) return PyErr_NoMemory();
    const Freed freed{memory};
    job.scratch = lay_out(memory + row_weight_bytes, n_cols);

    Doubles row_mean, row_m2, col_mean, col_m2, weighted_mean, weighted_m2, cross_sum;
    if (!row_mean.make(n_rows) || !row_m2.make(n_rows) || !col_mean.make(entries) || !col_m2.make(entries))
        return nullptr;
    job.row_mean = row_mean.data, job.row_m2 = row_m2.data, job.col_mean = col_mean.data, job.col_m2 = col_m2.data;
    if (col_weight.buffer.obj) {
        if (!weighted_mean.make(n_rows) || !weighted_m2.make(n_rows)) return nullptr;
        job.weighted_row_mean = weighted_mean.data, job.weighted_row_m2 = weighted_m2.data;
        job.has_col_weight = true;
        memset(job.scratch.gain, 0, 4 * padded(n_cols));
        memcpy(job.scratch.gain, col_weight.bytes(), 4 * n_cols);
        job.exact = extreme(job.scratch.gain, n_cols);
    }
    if (row_weight.buffer.obj) {
        if (!weighted_mean.make(entries) || !weighted_m2.make(entries)) return nullptr;
        job.weighted_col_mean = weighted_mean.data, job.weighted_col_m2 = weighted_m2.data;
        memcpy(memory, row_weight.bytes(), 4 * n_rows);
        job.row_weight = reinterpret_cast<const float *>(memory);
        job.exact = extreme(job.row_weight, n_rows);
    }
    if (job.cross) {
        if (!cross_sum.make(entries)) return nullptr;
        job.cross_sum = cross_sum.data;
    }
    install_handler();
    bool whole;
    Py_BEGIN_ALLOW_THREADS
    whole = run_guarded(input.each, input.nbytes, run_marginals);
    Py_END_ALLOW_THREADS
    if (!whole) return vanished();

    return Py_BuildValue("(NNNNNNNdK)", row_mean.give(), row_m2.give(), col_mean.give(), col_m2.give(),
                         weighted_mean.give(), weighted_m2.give(), cross_sum.give(), job.abs_max,
                         static_cast<unsigned long long>(job.nonfinite));
}

// expand(chunk, out): the chunk's elements times its weights as float32[rows, cols] into `out`; NaN where not finite.
PyObject *py_expand(PyObject *, PyObject *args) {
    PyObject *tuple, *out_object;
    Input input;
    View out;
    if (!PyArg_ParseTuple(args, "O!O:expand", &PyTuple_Type, &tuple, &out_object) || !input.read(tuple) ||
        !out.open(out_object, PyBUF_WRITABLE))
        return nullptr;
    Job &job = input.each.job;
    size_t elements;
    if (__builtin_mul_overflow(job.rows, job.cols, &elements) || out.size() / 4 != elements || out.size() % 4 ||
        reinterpret_cast<uintptr_t>(out.bytes()) % 4)
        return refuse("out is not float32[rows, cols]");
    // Weights may lie anywhere; the kernel wants them aligned, and the GIL is released while it reads them.
    std::vector<float> weights((input.col_weight.size() + input.row_weight.size()) / 4);
    if (input.col_weight.buffer.obj) memcpy(weights.data(), input.col_weight.bytes(), input.col_weight.size());
    if (input.row_weight.buffer.obj) memcpy(weights.data(), input.row_weight.bytes(), input.row_weight.size());
    job.row_weight = input.row_weight.buffer.obj ? weights.data() : nullptr;
    job.scratch.gain = input.col_weight.buffer.obj ? weights.data() : nullptr;
    job.out = static_cast<float *>(out.buffer.buf);
    install_handler();
    bool whole;
    Py_BEGIN_ALLOW_THREADS
    whole = run_guarded(input.each, input.nbytes, run_expand);
    Py_END_ALLOW_THREADS
    if (!whole) return vanished();
    Py_RETURN_NONE;
}

// ------------------------------------------------------------------------------------------------- merging and pooling

// One part of a merge: rows per unit, and float64[units, cols] each.
struct Part {
    std::vector<double> counts;
    View mean, m2;
};

bool read_part(PyObject *object, Part &part, size_t &cols) {
    PyObject *counts, *mean, *m2;
    if (!PyArg_ParseTuple(object, "O!OO:part", &PyTuple_Type, &counts, &mean, &m2)) return false;
    const Py_ssize_t units = PyTuple_GET_SIZE(counts);
    for (Py_ssize_t u = 0; u < units; u++) {
        const Py_ssize_t count = PyLong_AsSsize_t(PyTuple_GET_ITEM(counts, u));
        if (count < 1) {
            if (!PyErr_Occurred()) refuse("counts must be positive");
            return false;
        }
        part.counts.push_back(static_cast<double>(count));
    }
    if (!part.mean.open(mean) || !part.m2.open(m2)) return false;
    if (cols == 0 && units) cols = part.mean.size() / 8 / static_cast<size_t>(units);
    if (cols == 0 || part.mean.size() != 8 * cols * static_cast<size_t>(units) || part.m2.size() != part.mean.size()) {
        refuse("a part needs one mean and M2 for every unit and column");
        return false;
    }
    return true;
}

// merge(level, parts): column moments of consecutive units as one, folded left to right (Chan, Golub & LeVeque 1979).
// parts: a sequence of (counts, mean, m2). Returns (mean, m2), float64[cols].
PyObject *py_merge(PyObject *, PyObject *args) {
    const char *level_name;
    PyObject *list;
    if (!PyArg_ParseTuple(args, "sO:merge", &level_name, &list)) return nullptr;
    const Level *level = level_named(level_name);
    const Owned sequence{level ? PySequence_Fast(list, "parts must be a sequence") : nullptr};
    if (!sequence.object) return nullptr;
    const size_t count = static_cast<size_t>(PySequence_Fast_GET_SIZE(sequence.object));
    if (count == 0) return refuse("nothing to merge");
    std::vector<Part> parts(count);
    size_t cols = 0;
    for (size_t i = 0; i < count; i++)
        if (!read_part(PySequence_Fast_GET_ITEM(sequence.object, static_cast<Py_ssize_t>(i)), parts[i], cols))
            return nullptr;
    Doubles mean, m2;
    if (!mean.make(cols) || !m2.make(cols)) return nullptr;
    Py_BEGIN_ALLOW_THREADS
    double total = 0;
    for (const Part &part : parts)
        for (size_t unit = 0; unit < part.counts.size(); unit++) {
            const unsigned char *unit_mean = part.mean.bytes() + 8 * cols * unit;
            const unsigned char *unit_m2 = part.m2.bytes() + 8 * cols * unit;
            if (total == 0) memcpy(mean.data, unit_mean, 8 * cols), memcpy(m2.data, unit_m2, 8 * cols);
            else level->fold(total, mean.data, m2.data, part.counts[unit], unit_mean, unit_m2, cols);
            total += part.counts[unit];
        }
    Py_END_ALLOW_THREADS
    return pair(mean, m2);
}

// add(parts, cols): all units of all parts, float64[units, cols] each, added left to right. Returns float64[cols].
PyObject *py_add(PyObject *, PyObject *args) {
    PyObject *list;
    Py_ssize_t n;
    if (!PyArg_ParseTuple(args, "On:add", &list, &n)) return nullptr;
    if (n < 1) return refuse("cols must be at least 1");
    const Owned sequence{PySequence_Fast(list, "parts must be a sequence")};
    if (!sequence.object) return nullptr;
    const size_t cols = static_cast<size_t>(n), row_bytes = 8 * cols;
    Doubles sum;
    if (!sum.make(cols)) return nullptr;
    memset(sum.data, 0, row_bytes);
    for (Py_ssize_t p = 0; p < PySequence_Fast_GET_SIZE(sequence.object); p++) {
        View part;
        if (!part.open(PySequence_Fast_GET_ITEM(sequence.object, p))) return nullptr;
        if (part.size() % row_bytes) return refuse("a part does not hold whole units");
        for (size_t unit = 0; unit < part.size() / row_bytes; unit++)
            for (size_t j = 0; j < cols; j++) sum.data[j] = canonical(sum.data[j] + part.at(unit * cols + j));
    }
    return sum.give();
}

// pool(mean, m2, count, block): every `block` consecutive entries, of `count` elements each, as one. Returns (mean, m2).
PyObject *py_pool(PyObject *, PyObject *args) {
    PyObject *mean_object, *m2_object;
    Py_ssize_t count, block;
    if (!PyArg_ParseTuple(args, "OOnn:pool", &mean_object, &m2_object, &count, &block)) return nullptr;
    View mean, m2;
    if (!mean.open(mean_object) || !m2.open(m2_object)) return nullptr;
    if (count < 1 || block < 1) return refuse("count and block must be at least 1");
    const size_t size = static_cast<size_t>(block), n = mean.size() / 8;
    if (mean.size() % 8 || mean.size() != m2.size() || n % size) return refuse("block does not divide the entries");
    Doubles mean_out, m2_out;
    if (!mean_out.make(n / size) || !m2_out.make(n / size)) return nullptr;
    Py_BEGIN_ALLOW_THREADS
    for (size_t b = 0; b < n / size; b++) {
        // Four running sums, entry i in sum i % 4: four times as fast as one, and an order that never changes.
        double sum[4] = {0, 0, 0, 0}, within[4] = {0, 0, 0, 0}, between[4] = {0, 0, 0, 0};
        for (size_t i = 0; i < size; i++) sum[i % 4] += mean.at(b * size + i), within[i % 4] += m2.at(b * size + i);
        const double pooled = ((sum[0] + sum[1]) + (sum[2] + sum[3])) / static_cast<double>(size);
        for (size_t i = 0; i < size; i++) {
            const double d = mean.at(b * size + i) - pooled;
            between[i % 4] += d * d;
        }
        const double inside = (within[0] + within[1]) + (within[2] + within[3]);
        const double outside = (between[0] + between[1]) + (between[2] + between[3]);
        mean_out.data[b] = canonical(pooled);
        m2_out.data[b] = canonical(inside + static_cast<double>(count) * outside);
    }
    Py_END_ALLOW_THREADS
    return pair(mean_out, m2_out);
}

// --------------------------------------------------------------------------------------------------- residual profile

uint64_t bits_of(double x) {
    uint64_t bits;
    memcpy(&bits, &x, 8);
    return bits;
}

// Natural logarithm from additions, multiplications and one division, so that it is the same on every machine (libm's
// is not). x = m 2^e with m in [sqrt(1/2), sqrt(2)), log m = 2 atanh((m - 1) / (m + 1)); error below 2e-16 relative.
double logarithm(double x) {
    if (!(x > 0)) return x == 0 ? -HUGE_VAL : __builtin_nan("");
    if (x > 0x1.fffffffffffffp1023) return x;
    int e = 0;
    if (x < 0x1p-1022) x *= 0x1p54, e = -54;
    uint64_t bits = bits_of(x);
    e += static_cast<int>(bits >> 52) - 1023;
    bits = (bits & 0x000fffffffffffff) | 0x3ff0000000000000;
    double m;
    memcpy(&m, &bits, 8);
    if (m > 1.4142135623730951) m *= 0.5, e++;
    const double s = (m - 1) / (m + 1), z = s * s;
    double series = 0;
    for (int odd = 23; odd >= 1; odd -= 2) series = series * z + 1.0 / odd;
    return static_cast<double>(e) * 0x1.62e42fefa39efp-1 + 2 * s * series;
}

// Nearest float16, ties to even, straight from float64 (by way of float32 it would round twice).
uint16_t half_of(double x) {
    const uint64_t bits = bits_of(x), magnitude = bits & 0x7fffffffffffffff;
    const uint16_t sign = static_cast<uint16_t>(bits >> 48 & 0x8000);
    if (magnitude > 0x7ff0000000000000) return 0x7e00;
    if (magnitude >= 0x40effe0000000000) return sign | 0x7c00; // 65520 and above
    const int exponent = static_cast<int>(magnitude >> 52) - 1023;
    if (exponent < -25) return sign;
    // Bits that a float16 of this exponent lacks: 42 of a normal number, one more for each step below 2^-14.
    const int lost = exponent < -14 ? 42 + (-14 - exponent) : 42;
    const uint64_t mantissa = (magnitude & 0x000fffffffffffff) | 0x0010000000000000;
    const uint64_t kept = mantissa >> lost, rest = mantissa & ((uint64_t(1) << lost) - 1);
    const uint64_t tie = uint64_t(1) << (lost - 1);
    const uint64_t rounded = kept + (rest > tie || (rest == tie && (kept & 1)));
    // The leading one of a normal number adds 1 to the exponent field; a carry out of the mantissa does so too.
    const uint64_t field = exponent < -14 ? 0 : static_cast<uint64_t>(exponent + 14) << 10;
    return static_cast<uint16_t>(sign | (field + rounded));
}

// log_rms(mean, m2, count, weight, cross, centre_square): see llmfp.kernels.Backend. Returns float16[entries].
PyObject *py_log_rms(PyObject *, PyObject *args) {
    PyObject *mean_object, *m2_object, *weight_object, *cross_object;
    Py_ssize_t count;
    double centre_square;
    if (!PyArg_ParseTuple(args, "OOnOOd:log_rms", &mean_object, &m2_object, &count, &weight_object, &cross_object,
                          &centre_square))
        return nullptr;
    View mean, m2, weight, cross;
    if (!mean.open(mean_object) || !m2.open(m2_object)) return nullptr;
    if (weight_object != Py_None && !weight.open(weight_object)) return nullptr;
    if (cross_object != Py_None && !cross.open(cross_object)) return nullptr;
    const size_t n = mean.size() / 8;
    if (count < 1) return refuse("count must be at least 1");
    if (mean.size() % 8 || m2.size() != mean.size()) return refuse("mean and m2 differ in size");
    if (weight.buffer.obj && weight.size() != 4 * n) return refuse("weight is not one float32 per entry");
    if (cross.buffer.obj && cross.size() != 8 * n) return refuse("cross is not one float64 per entry");
    PyObject *result = PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(2 * n));
    if (!result) return nullptr;
    char *out = PyBytes_AS_STRING(result);
    const double size = static_cast<double>(count);
    Py_BEGIN_ALLOW_THREADS
    for (size_t i = 0; i < n; i++) {
        float weight32 = 1;
        if (weight.buffer.obj) memcpy(&weight32, weight.bytes() + 4 * i, 4);
        const double w = weight32, centre = mean.at(i);
        double square = w * w * (centre * centre + m2.at(i) / size);
        if (cross.buffer.obj) {
            square = square - 2.0 * w * cross.at(i) / size + centre_square;
            square = square < 0 ? 0 : square;
        }
        const uint16_t half = half_of(0.5 * logarithm(square));
        memcpy(out + 2 * i, &half, 2);
    }
    Py_END_ALLOW_THREADS
    return result;
}

// -------------------------------------------------------------------------------------------------------------- rest

struct Copy {
    void *to;
    const void *from;
    size_t nbytes;
};

void run_copy(void *argument) {
    const Copy *copy = static_cast<const Copy *>(argument);
    memcpy(copy->to, copy->from, copy->nbytes);
}

// copy(source, offset, into): fills `into`. OSError where a mapped file has no such page any more.
PyObject *py_copy(PyObject *, PyObject *args) {
    PyObject *source_object, *out_object;
    Py_ssize_t offset;
    if (!PyArg_ParseTuple(args, "OnO:copy", &source_object, &offset, &out_object)) return nullptr;
    View source, out;
    if (!source.open(source_object) || !out.open(out_object, PyBUF_WRITABLE)) return nullptr;
    if (offset < 0 || static_cast<size_t>(offset) > source.size() ||
        out.size() > source.size() - static_cast<size_t>(offset))
        return refuse("out reaches beyond the end of the source");
    Copy copy{out.buffer.buf, source.bytes() + offset, out.size()};
    install_handler();
    bool whole;
    Py_BEGIN_ALLOW_THREADS
    whole = guarded(copy.from, copy.nbytes, run_copy, &copy);
    Py_END_ALLOW_THREADS
    if (!whole) return vanished();
    Py_RETURN_NONE;
}

struct Words {
    const unsigned char *from;
    size_t nbytes;
    uint64_t sum;
};

void run_sum_words(void *argument) {
    Words *words = static_cast<Words *>(argument);
    words->sum = llmfp_sum_words(words->from, words->nbytes);
}

// sum_words(buffer, offset, nbytes): the sum of all 64-bit words there, modulo 2^64, without the GIL: what reading costs.
// Raises OSError where a mapped file has no such bytes any more.
PyObject *py_sum_words(PyObject *, PyObject *args) {
    PyObject *object;
    Py_ssize_t offset, nbytes;
    if (!PyArg_ParseTuple(args, "Onn:sum_words", &object, &offset, &nbytes)) return nullptr;
    View view;
    if (!view.open(object)) return nullptr;
    if (offset < 0 || nbytes < 0 || static_cast<size_t>(offset) > view.size() ||
        static_cast<size_t>(nbytes) > view.size() - static_cast<size_t>(offset))
        return refuse("range outside the buffer");
    Words words{view.bytes() + offset, static_cast<size_t>(nbytes), 0};
    install_handler();
    bool whole;
    Py_BEGIN_ALLOW_THREADS
    whole = guarded(words.from, words.nbytes, run_sum_words, &words);
    Py_END_ALLOW_THREADS
    if (!whole) return vanished();
    return PyLong_FromUnsignedLongLong(words.sum);
}

// levels(): SIMD levels that this machine can run, best first.
PyObject *py_levels(PyObject *, PyObject *) {
    size_t n = 0;
    while (n < LEVELS && levels()[n]) n++;
    PyObject *names = PyTuple_New(static_cast<Py_ssize_t>(n));
    for (size_t i = 0; names && i < n; i++) {
        PyObject *name = PyUnicode_FromString(levels()[i]->name);
        if (!name) Py_CLEAR(names);
        else PyTuple_SET_ITEM(names, static_cast<Py_ssize_t>(i), name);
    }
    return names;
}

PyMethodDef METHODS[] = {{"levels", py_levels, METH_NOARGS, nullptr},
                         {"marginals", py_marginals, METH_VARARGS, nullptr},
                         {"expand", py_expand, METH_VARARGS, nullptr},
                         {"merge", py_merge, METH_VARARGS, nullptr},
                         {"add", py_add, METH_VARARGS, nullptr},
                         {"pool", py_pool, METH_VARARGS, nullptr},
                         {"log_rms", py_log_rms, METH_VARARGS, nullptr},
                         {"copy", py_copy, METH_VARARGS, nullptr},
                         {"sum_words", py_sum_words, METH_VARARGS, nullptr},
                         {"populate", pages::populate, METH_VARARGS, nullptr},
                         {"release", pages::release, METH_VARARGS, nullptr},
                         {nullptr, nullptr, 0, nullptr}};

PyModuleDef MODULE = {PyModuleDef_HEAD_INIT, "llmfp._native", "The native CPU kernel; see llmfp.kernels.native_cpu.",
                      -1,                    METHODS,         nullptr,
                      nullptr,               nullptr,         nullptr};

} // namespace
} // namespace llmfp

PyMODINIT_FUNC PyInit__native() { return PyModule_Create(&llmfp::MODULE); }
