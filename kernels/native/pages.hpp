// Pages of a mapped file: mapped in one call before they are read, given back after.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cerrno>
#include <cstdint>
#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#ifndef EHWPOISON
#define EHWPOISON EFAULT
#endif
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif
#endif

namespace pages {

// madvise(2) on the pages that hold `nbytes` at `offset` of a buffer, without the GIL; 0 or errno.
inline int advise(const Py_buffer& buffer, Py_ssize_t offset, Py_ssize_t nbytes, int advice) {
#ifdef __linux__
    const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const uintptr_t start = reinterpret_cast<uintptr_t>(buffer.buf) + static_cast<uintptr_t>(offset);
    const uintptr_t first = start / page * page;
    const uintptr_t stop = (start + static_cast<uintptr_t>(nbytes) + page - 1) / page * page;
    int result;
    Py_BEGIN_ALLOW_THREADS
    result = madvise(reinterpret_cast<void*>(first), stop - first, advice) == 0 ? 0 : errno;
    Py_END_ALLOW_THREADS
    return result;
#else
    (void)buffer, (void)offset, (void)nbytes, (void)advice;
    return ENOSYS;
#endif
}

inline bool parse(PyObject* args, Py_buffer& buffer, Py_ssize_t& offset, Py_ssize_t& nbytes) {
    if (!PyArg_ParseTuple(args, "y*nn", &buffer, &offset, &nbytes)) return false;
    if (offset >= 0 && nbytes >= 0 && offset <= buffer.len && nbytes <= buffer.len - offset) return true;
    PyBuffer_Release(&buffer);
    PyErr_SetString(PyExc_ValueError, "range outside the buffer");
    return false;
}

// populate(buffer, offset, nbytes): maps the pages now, all in one call instead of one fault per 16.
// Raises OSError (EIO) where the file has no such bytes any more. Kernels before 5.14 cannot: pages then fault in.
inline PyObject* populate(PyObject*, PyObject* args) {
    Py_buffer buffer;
    Py_ssize_t offset, nbytes;
    if (!parse(args, buffer, offset, nbytes)) return nullptr;
    int error = 0;
#ifdef __linux__
    error = advise(buffer, offset, nbytes, MADV_POPULATE_READ);
#endif
    PyBuffer_Release(&buffer);
    if (error == EFAULT || error == EIO || error == EHWPOISON) {
        errno = EIO;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    Py_RETURN_NONE;
}

// release(buffer, offset, nbytes): unmaps the pages from this process; they stay in the page cache.
inline PyObject* release(PyObject*, PyObject* args) {
    Py_buffer buffer;
    Py_ssize_t offset, nbytes;
    if (!parse(args, buffer, offset, nbytes)) return nullptr;
#ifdef __linux__
    advise(buffer, offset, nbytes, MADV_DONTNEED);
#endif
    PyBuffer_Release(&buffer);
    Py_RETURN_NONE;
}

}  // namespace pages
