// llmfp._native: the C++ kernel for Python, with nothing but CPython in between.
//
// The GIL is released around all work. Buffers may be pages of a file that somebody truncates meanwhile: whatever reads
// them runs under a guard that turns SIGBUS into OSError.

#include "pages.hpp"

#include <atomic>
#include <csetjmp>
#include <csignal>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "kernel.hpp"

#if defined(__x86_64__)
extern const Level level_avx512, level_avx2;
#elif defined(__aarch64__)
extern const Level level_neon;
#endif
extern const Level level_scalar;

namespace {

// ---------------------------------------------------------------------------------------------- levels

std::vector<const Level*> levels_here() {
    std::vector<const Level*> levels;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        levels.push_back(&level_avx512);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        levels.push_back(&level_avx2);
#elif defined(__aarch64__)
    levels.push_back(&level_neon);
#endif
    levels.push_back(&level_scalar);
    return levels;
}

const Level* level_named(const char* name) {
    for (const Level* level : levels_here())
        if (std::strcmp(level->name, name) == 0) return level;
    PyErr_Format(PyExc_ValueError, "no SIMD level %s on this machine", name);
    return nullptr;
}

// ---------------------------------------------------------------------------------------------- guard

// Volatile, and fenced where it is set: the compiler must not see that ordinary code never reads it.
thread_local sigjmp_buf* volatile guard = nullptr;
struct sigaction handler_before;

void on_bus_error(int signal, siginfo_t* info, void* context) {
    if (guard) siglongjmp(*guard, 1);
    // Not ours: whoever was there before decides.
    if (handler_before.sa_flags & SA_SIGINFO) return handler_before.sa_sigaction(signal, info, context);
    if (handler_before.sa_handler != SIG_DFL && handler_before.sa_handler != SIG_IGN)
        return handler_before.sa_handler(signal);
    sigaction(signal, &handler_before, nullptr);
}

void install_handler() {
    static std::once_flag once;
    std::call_once(once, [] {
        struct sigaction action = {};
        action.sa_sigaction = on_bus_error;
        action.sa_flags = SA_SIGINFO | SA_NODEFER;
        sigaction(SIGBUS, &action, &handler_before);
    });
}

// Runs `work`, which must own nothing that needs a destructor; false when a page of a mapped file was gone.
template <class Work>
bool guarded(Work work) {
    install_handler();
    sigjmp_buf here;
    if (sigsetjmp(here, 0)) {
        guard = nullptr;
        return false;
    }
    guard = &here;
    std::atomic_signal_fence(std::memory_order_seq_cst);
    work();
    std::atomic_signal_fence(std::memory_order_seq_cst);
    guard = nullptr;
    return true;
}

PyObject* page_is_gone() {
    errno = EIO;
    return PyErr_SetFromErrno(PyExc_OSError);
}

// ---------------------------------------------------------------------------------------------- Python values

struct Buffer {
    Py_buffer view = {};
    ~Buffer() {
        if (view.obj) PyBuffer_Release(&view);
    }
    bool get(PyObject* object, int flags = PyBUF_SIMPLE) { return PyObject_GetBuffer(object, &view, flags) == 0; }
    const double* doubles() const { return static_cast<const double*>(view.buf); }
    Py_ssize_t size() const { return view.len / static_cast<Py_ssize_t>(sizeof(double)); }
};

struct Deleter {
    void operator()(PyObject* object) const { Py_XDECREF(object); }
};
using Owned = std::unique_ptr<PyObject, Deleter>;

Owned new_doubles(Py_ssize_t count) {
    return Owned(PyBytes_FromStringAndSize(nullptr, count * static_cast<Py_ssize_t>(sizeof(double))));
}

double* doubles_of(const Owned& bytes) { return reinterpret_cast<double*>(PyBytes_AS_STRING(bytes.get())); }

PyObject* refuse(const char* message) {
    PyErr_SetString(PyExc_ValueError, message);
    return nullptr;
}

struct Stored {
    const char* name;
    Dtype dtype;
    Py_ssize_t size;
};
constexpr Stored kStored[] = {{"BF16", kBF16, 2},    {"F16", kF16, 2},         {"F32", kF32, 4},
                              {"F64", kF64, 8},      {"F8_E4M3", kE4M3, 1},    {"F8_E5M2", kE5M2, 1}};

// (rows - 1) * stride + cols * size <= available, without overflow.
bool fits(Py_ssize_t rows, Py_ssize_t cols, Py_ssize_t stride, Py_ssize_t size, Py_ssize_t available) {
    if (cols > available / size) return false;
    const Py_ssize_t row = cols * size;
    if (rows > 1 && stride < row) return false;
    return rows == 1 || rows - 1 <= (available - row) / stride;
}

// ---------------------------------------------------------------------------------------------- functions

PyObject* marginals(PyObject*, PyObject* args) {
    const char *level_name, *dtype_name;
    PyObject *data_object, *col_object, *row_object;
    Py_ssize_t rows, cols, offset, stride, unit_rows;
    int cross;
    if (!PyArg_ParseTuple(args, "sOsnnnnnOOp", &level_name, &data_object, &dtype_name, &rows, &cols, &offset, &stride,
                          &unit_rows, &col_object, &row_object, &cross))
        return nullptr;
    const Level* level = level_named(level_name);
    if (!level) return nullptr;
    const Stored* stored = nullptr;
    for (const Stored& each : kStored)
        if (std::strcmp(each.name, dtype_name) == 0) stored = &each;
    if (!stored) return refuse("unknown dtype");
    if (rows < 1 || cols < 1 || unit_rows < 1) return refuse("rows, cols and unit_rows must be positive");
    Buffer data, col_weight, row_weight;
    if (!data.get(data_object)) return nullptr;
    if (offset < 0 || offset > data.view.len || !fits(rows, cols, stride, stored->size, data.view.len - offset))
        return refuse("the matrix reaches outside its buffer");
    const bool by_col = col_object != Py_None, by_row = row_object != Py_None;
    if (by_row && (by_col || cross)) return refuse("row_weight goes with neither col_weight nor cross");
    if (by_col && !col_weight.get(col_object)) return nullptr;
    if (by_row && !row_weight.get(row_object)) return nullptr;
    if ((by_col && col_weight.view.len != 4 * cols) || (by_row && row_weight.view.len != 4 * rows))
        return refuse("a weight must be float32, one per column or row");
    const Py_ssize_t units = (rows + unit_rows - 1) / unit_rows;
    if (units > PY_SSIZE_T_MAX / 64 / cols) return refuse("too many columns");
    const Owned row_mean = new_doubles(rows), row_m2 = new_doubles(rows);
    const Owned col_mean = new_doubles(units * cols), col_m2 = new_doubles(units * cols);
    Owned weighted_mean, weighted_m2, products;
    if (by_col || by_row) {
        weighted_mean = new_doubles(by_col ? rows : units * cols);
        weighted_m2 = new_doubles(by_col ? rows : units * cols);
    }
    if (cross) products = new_doubles(units * cols);
    if (PyErr_Occurred()) return nullptr;
    std::unique_ptr<double[]> scratch(new (std::nothrow) double[static_cast<size_t>(scratch_doubles(cols))]);
    if (!scratch) return PyErr_NoMemory();
    Request request = {};
    request.data = static_cast<const uint8_t*>(data.view.buf) + offset;
    request.rows = rows, request.cols = cols, request.row_stride = stride, request.unit_rows = unit_rows;
    request.col_weight = by_col ? static_cast<const float*>(col_weight.view.buf) : nullptr;
    request.row_weight = by_row ? static_cast<const float*>(row_weight.view.buf) : nullptr;
    request.row_mean = doubles_of(row_mean), request.row_m2 = doubles_of(row_m2);
    request.col_mean = doubles_of(col_mean), request.col_m2 = doubles_of(col_m2);
    request.weighted_mean = weighted_mean ? doubles_of(weighted_mean) : nullptr;
    request.weighted_m2 = weighted_m2 ? doubles_of(weighted_m2) : nullptr;
    request.cross = products ? doubles_of(products) : nullptr;
    request.scratch = scratch.get();
    bool whole;
    Py_BEGIN_ALLOW_THREADS
    whole = guarded([level, stored, &request] { level->reduce(stored->dtype, request); });
    Py_END_ALLOW_THREADS
    if (!whole) return page_is_gone();
    PyObject* const none = Py_None;
    return Py_BuildValue("OOOOOOOdL", row_mean.get(), row_m2.get(), col_mean.get(), col_m2.get(),
                         weighted_mean ? weighted_mean.get() : none, weighted_m2 ? weighted_m2.get() : none,
                         products ? products.get() : none, request.abs_max, static_cast<long long>(request.nonfinite));
}

// merge(level, parts): the column moments of consecutive units as one, folded left to right. parts is a sequence of
// (counts, mean, m2): rows per unit, and float64[units, cols] each. Returns (mean, m2), float64[cols].
PyObject* merge(PyObject*, PyObject* args) {
    const char* level_name;
    PyObject* list;
    if (!PyArg_ParseTuple(args, "sO", &level_name, &list)) return nullptr;
    const Level* level = level_named(level_name);
    if (!level) return nullptr;
    const Owned parts(PySequence_Fast(list, "parts must be a sequence"));
    if (!parts) return nullptr;
    struct Part {
        std::vector<double> counts;
        Buffer mean, m2;
    };
    std::vector<Part> taken(static_cast<size_t>(PySequence_Fast_GET_SIZE(parts.get())));
    Py_ssize_t cols = -1;
    for (size_t i = 0; i < taken.size(); i++) {
        PyObject *counts, *mean, *m2;
        if (!PyArg_ParseTuple(PySequence_Fast_GET_ITEM(parts.get(), static_cast<Py_ssize_t>(i)), "O!OO", &PyTuple_Type,
                              &counts, &mean, &m2))
            return nullptr;
        Part& part = taken[i];
        const Py_ssize_t units = PyTuple_GET_SIZE(counts);
        for (Py_ssize_t u = 0; u < units; u++) part.counts.push_back(PyFloat_AsDouble(PyTuple_GET_ITEM(counts, u)));
        if (PyErr_Occurred() || !part.mean.get(mean) || !part.m2.get(m2)) return nullptr;
        if (i == 0 && units) cols = part.mean.size() / units;
        if (!units || part.mean.view.len != part.m2.view.len || part.mean.size() != units * cols)
            return refuse("every part needs one mean and M2 per unit and column");
    }
    if (taken.empty()) return refuse("nothing to merge");
    const Owned mean = new_doubles(cols), m2 = new_doubles(cols);
    if (!mean || !m2) return nullptr;
    double *const into_mean = doubles_of(mean), *const into_m2 = doubles_of(m2);
    Py_BEGIN_ALLOW_THREADS
    double total = 0;
    for (const Part& part : taken)
        for (size_t u = 0; u < part.counts.size(); u++) {
            const double* unit_mean = part.mean.doubles() + static_cast<ptrdiff_t>(u) * cols;
            const double* unit_m2 = part.m2.doubles() + static_cast<ptrdiff_t>(u) * cols;
            if (total == 0) {
                std::copy(unit_mean, unit_mean + cols, into_mean);
                std::copy(unit_m2, unit_m2 + cols, into_m2);
            } else {
                level->fold(total, into_mean, into_m2, part.counts[u], unit_mean, unit_m2, cols);
            }
            total += part.counts[u];
        }
    Py_END_ALLOW_THREADS
    return Py_BuildValue("OO", mean.get(), m2.get());
}

// add(parts, cols): the sum of all units of parts, float64[units, cols] each, left to right. Returns float64[cols].
PyObject* add(PyObject*, PyObject* args) {
    PyObject* list;
    Py_ssize_t cols;
    if (!PyArg_ParseTuple(args, "On", &list, &cols)) return nullptr;
    const Owned parts(PySequence_Fast(list, "parts must be a sequence"));
    if (!parts || cols < 1) return parts ? refuse("cols must be positive") : nullptr;
    const Owned sum = new_doubles(cols);
    if (!sum) return nullptr;
    double* const into = doubles_of(sum);
    std::fill(into, into + cols, 0.0);
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(parts.get()); i++) {
        Buffer part;
        if (!part.get(PySequence_Fast_GET_ITEM(parts.get(), i))) return nullptr;
        if (part.size() % cols) return refuse("every part needs whole units");
        for (Py_ssize_t c = 0; c < part.size(); c++) into[c % cols] += part.doubles()[c];
    }
    return Py_BuildValue("O", sum.get());
}

// pool(mean, m2, count, block): every `block` consecutive entries of `count` elements each as one. (mean, m2).
PyObject* pool(PyObject*, PyObject* args) {
    PyObject *mean_object, *m2_object;
    Py_ssize_t count, block;
    if (!PyArg_ParseTuple(args, "OOnn", &mean_object, &m2_object, &count, &block)) return nullptr;
    Buffer mean, m2;
    if (!mean.get(mean_object) || !m2.get(m2_object)) return nullptr;
    if (block < 1 || mean.view.len != m2.view.len || mean.size() % block)
        return refuse("block must divide the number of entries");
    const Py_ssize_t blocks = mean.size() / block;
    const Owned pooled_mean = new_doubles(blocks), pooled_m2 = new_doubles(blocks);
    if (!pooled_mean || !pooled_m2) return nullptr;
    double *const into_mean = doubles_of(pooled_mean), *const into_m2 = doubles_of(pooled_m2);
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t b = 0; b < blocks; b++) {
        const double *means = mean.doubles() + b * block, *m2s = m2.doubles() + b * block;
        double sum = 0, within = 0, between = 0;
        for (Py_ssize_t i = 0; i < block; i++) sum += means[i], within += m2s[i];
        into_mean[b] = sum / static_cast<double>(block);
        for (Py_ssize_t i = 0; i < block; i++) between += (means[i] - into_mean[b]) * (means[i] - into_mean[b]);
        into_m2[b] = within + static_cast<double>(count) * between;
    }
    Py_END_ALLOW_THREADS
    return Py_BuildValue("OO", pooled_mean.get(), pooled_m2.get());
}

// binary64 → binary16, rounded once, to nearest even.
uint16_t half_of(double value) {
    if (std::isnan(value)) return 0x7e00;
    const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
    const double magnitude = std::fabs(value);
    if (magnitude >= 65520.0) return sign | 0x7c00;
    if (magnitude == 0.0) return sign;
    int exponent;
    std::frexp(magnitude, &exponent);                       // magnitude = f · 2^exponent, f in [½, 1)
    const int quantum = std::max(exponent - 11, -24);       // the last place of binary16 at this magnitude
    const double steps = std::nearbyint(std::ldexp(magnitude, -quantum));
    const int whole = static_cast<int>(steps);
    if (quantum == -24) return static_cast<uint16_t>(sign | whole);  // subnormal, or the smallest normals
    return static_cast<uint16_t>(sign | (((quantum + 24) << 10) + whole));
}

// log_rms(mean, m2, count, weight, cross, centre_square): see kernels.Backend. float16[entries].
PyObject* log_rms(PyObject*, PyObject* args) {
    PyObject *mean_object, *m2_object, *weight_object, *cross_object;
    Py_ssize_t count;
    double centre_square;
    if (!PyArg_ParseTuple(args, "OOnOOd", &mean_object, &m2_object, &count, &weight_object, &cross_object,
                          &centre_square))
        return nullptr;
    Buffer mean, m2, weight, cross;
    if (!mean.get(mean_object) || !m2.get(m2_object)) return nullptr;
    if (weight_object != Py_None && !weight.get(weight_object)) return nullptr;
    if (cross_object != Py_None && !cross.get(cross_object)) return nullptr;
    const Py_ssize_t size = mean.size();
    if (count < 1 || m2.size() != size || (weight.view.obj && weight.view.len != 4 * size) ||
        (cross.view.obj && cross.size() != size))
        return refuse("mean, m2, weight and cross must have one entry each");
    const Owned result(PyBytes_FromStringAndSize(nullptr, 2 * size));
    if (!result) return nullptr;
    uint16_t* const into = reinterpret_cast<uint16_t*>(PyBytes_AS_STRING(result.get()));
    Py_BEGIN_ALLOW_THREADS
    const double n = static_cast<double>(count);
    for (Py_ssize_t i = 0; i < size; i++) {
        const double w = weight.view.obj ? static_cast<const float*>(weight.view.buf)[i] : 1.0;
        const double mu = mean.doubles()[i];
        double square = w * w * (mu * mu + m2.doubles()[i] / n);
        if (cross.view.obj) square = std::max(square - 2.0 * w * cross.doubles()[i] / n + centre_square, 0.0);
        into[i] = half_of(0.5 * std::log(square));
    }
    Py_END_ALLOW_THREADS
    return Py_BuildValue("O", result.get());
}

// copy(source, offset, into): fills `into` from a buffer that may be a mapped file. Raises OSError if a page is gone.
PyObject* copy(PyObject*, PyObject* args) {
    PyObject *source_object, *into_object;
    Py_ssize_t offset;
    if (!PyArg_ParseTuple(args, "OnO", &source_object, &offset, &into_object)) return nullptr;
    Buffer source, into;
    if (!source.get(source_object) || !into.get(into_object, PyBUF_WRITABLE)) return nullptr;
    if (offset < 0 || offset > source.view.len || into.view.len > source.view.len - offset)
        return refuse("range outside the buffer");
    const void* const from = static_cast<const uint8_t*>(source.view.buf) + offset;
    void* const to = into.view.buf;
    const size_t nbytes = static_cast<size_t>(into.view.len);
    bool whole;
    Py_BEGIN_ALLOW_THREADS
    whole = guarded([to, from, nbytes] { std::memcpy(to, from, nbytes); });
    Py_END_ALLOW_THREADS
    if (!whole) return page_is_gone();
    Py_RETURN_NONE;
}

// levels(): the SIMD levels this machine can run, best first.
PyObject* levels(PyObject*, PyObject*) {
    const std::vector<const Level*> here = levels_here();
    Owned names(PyTuple_New(static_cast<Py_ssize_t>(here.size())));
    if (!names) return nullptr;
    for (size_t i = 0; i < here.size(); i++)
        PyTuple_SET_ITEM(names.get(), static_cast<Py_ssize_t>(i), PyUnicode_FromString(here[i]->name));
    return names.release();
}

PyMethodDef methods[] = {
    {"marginals", marginals, METH_VARARGS, nullptr}, {"merge", merge, METH_VARARGS, nullptr},
    {"add", add, METH_VARARGS, nullptr},             {"pool", pool, METH_VARARGS, nullptr},
    {"log_rms", log_rms, METH_VARARGS, nullptr},     {"copy", copy, METH_VARARGS, nullptr},
    {"populate", pages::populate, METH_VARARGS, nullptr}, {"release", pages::release, METH_VARARGS, nullptr},
    {"levels", levels, METH_NOARGS, nullptr},        {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", "The C++ kernel of llmfp.", -1, methods,
                      nullptr,               nullptr,   nullptr,                    nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__native() { return PyModule_Create(&module); }
