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

// madvise(2) on all that `grain`-sized, aligned pieces of memory hold of `nbytes` at `offset` of a buffer that is a
// whole mapping, without the GIL; 0 or errno.
inline int advise(const Py_buffer& buffer, Py_ssize_t offset, Py_ssize_t nbytes, int advice, uintptr_t grain) {
#ifdef __linux__
    const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    grain = grain > page ? grain : page;
    const uintptr_t begin = reinterpret_cast<uintptr_t>(buffer.buf);
    const uintptr_t end = (begin + static_cast<uintptr_t>(buffer.len) + page - 1) / page * page;
    const uintptr_t start = begin + static_cast<uintptr_t>(offset);
    uintptr_t first = start / grain * grain;
    uintptr_t stop = (start + static_cast<uintptr_t>(nbytes) + grain - 1) / grain * grain;
    first = first > begin ? first : begin;
    stop = stop < end ? stop : end;
    int result;
    Py_BEGIN_ALLOW_THREADS
    result = madvise(reinterpret_cast<void*>(first), stop - first, advice) == 0 ? 0 : errno;
    Py_END_ALLOW_THREADS
    return result;
#else
    (void)buffer, (void)offset, (void)nbytes, (void)advice, (void)grain;
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
    error = advise(buffer, offset, nbytes, MADV_POPULATE_READ, 0);
#endif
    PyBuffer_Release(&buffer);
    if (error == EFAULT || error == EIO || error == EHWPOISON) {
        errno = EIO;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    Py_RETURN_NONE;
}

// Linux may map up to this much around a page at once, where the page cache holds a file in large folios.
constexpr uintptr_t kMappedAtOnce = 2 << 20;

// release(buffer, offset, nbytes): unmaps the pages from this process, with whatever was mapped along with them; they
// stay in the page cache. Neighbours that another thread is still reading come back by themselves.
inline PyObject* release(PyObject*, PyObject* args) {
    Py_buffer buffer;
    Py_ssize_t offset, nbytes;
    if (!parse(args, buffer, offset, nbytes)) return nullptr;
#ifdef __linux__
    advise(buffer, offset, nbytes, MADV_DONTNEED, kMappedAtOnce);
#endif
    PyBuffer_Release(&buffer);
    Py_RETURN_NONE;
}

}  // namespace pages
