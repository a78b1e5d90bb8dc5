/* Hashing and taking the lines of events, at the speed that long logs ask for. Python does the same
   elsewhere, and what is unusual is left to it. SHA-256 is OpenSSL's. RFC 6962 §2.1. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <openssl/evp.h>

#include "_lines.h"

enum {
    HASH = 32,
    /* No line is shorter: its keys alone are longer. */
    SHORTEST = 256,
};

/* Keeps OpenSSL's SHA-256, which takes longer to look up than to use. Used under the GIL only. */
static EVP_MD_CTX *context;

static int hash(unsigned char prefix, const char *data, size_t size, unsigned char *to)
{
    if (EVP_DigestInit_ex(context, NULL, NULL) && EVP_DigestUpdate(context, &prefix, 1)
        && EVP_DigestUpdate(context, data, size) && EVP_DigestFinal_ex(context, to, NULL))
        return 1;
    PyErr_SetString(PyExc_RuntimeError, "OpenSSL can't hash");
    return 0;
}

static PyObject *hash_to_bytes(unsigned char prefix, const char *data, size_t size)
{
    PyObject *made = PyBytes_FromStringAndSize(NULL, HASH);
    if (made != NULL && !hash(prefix, data, size, (unsigned char *)PyBytes_AS_STRING(made)))
        Py_CLEAR(made);
    return made;
}

static PyObject *leaf_hashes(PyObject *module, PyObject *lines)
{
    (void)module;
    PyObject *items = PySequence_Fast(lines, "a sequence of bytes is needed");
    if (items == NULL)
        return NULL;
    Py_ssize_t count = PySequence_Fast_GET_SIZE(items);
    PyObject *hashes = PyList_New(count);
    for (Py_ssize_t i = 0; hashes != NULL && i < count; i++) {
        PyObject *made = NULL;
        char *data;
        Py_ssize_t size;
        if (PyBytes_AsStringAndSize(PySequence_Fast_GET_ITEM(items, i), &data, &size) == 0)
            made = hash_to_bytes(0, data, (size_t)size);
        if (made == NULL)
            Py_CLEAR(hashes);
        else
            PyList_SET_ITEM(hashes, i, made);
    }
    Py_DECREF(items);
    return hashes;
}

/* The inner node over two hashes. */
static PyObject *parent(PyObject *left, PyObject *right)
{
    char pair[2 * HASH], *data;
    Py_ssize_t size;
    for (int i = 0; i < 2; i++) {
        if (PyBytes_AsStringAndSize(i ? right : left, &data, &size) < 0)
            return NULL;
        if (size != HASH) {
            PyErr_SetString(PyExc_ValueError, "a hash has 32 bytes");
            return NULL;
        }
        memcpy(pair + i * HASH, data, HASH);
    }
    return hash_to_bytes(1, pair, sizeof pair);
}

static PyObject *parents(PyObject *module, PyObject *nodes)
{
    (void)module;
    PyObject *items = PySequence_Fast(nodes, "a sequence of bytes is needed");
    if (items == NULL)
        return NULL;
    Py_ssize_t count = PySequence_Fast_GET_SIZE(items) / 2;
    PyObject *hashes = PyList_New(count);
    for (Py_ssize_t i = 0; hashes != NULL && i < count; i++) {
        PyObject *made = parent(
            PySequence_Fast_GET_ITEM(items, 2 * i), PySequence_Fast_GET_ITEM(items, 2 * i + 1));
        if (made == NULL)
            Py_CLEAR(hashes);
        else
            PyList_SET_ITEM(hashes, i, made);
    }
    Py_DECREF(items);
    return hashes;
}

static PyObject *take_lines(PyObject *module, PyObject *arguments)
{
    (void)module;
    PyObject *bytes, *before;
    Py_ssize_t place, count = 0;
    long long seq;
    if (!PyArg_ParseTuple(arguments, "SnLS", &bytes, &place, &seq, &before))
        return NULL;
    if (place < 0 || place > PyBytes_GET_SIZE(bytes) || PyBytes_GET_SIZE(before) != TIME) {
        PyErr_SetString(PyExc_ValueError, "not a place in the data, or not a time");
        return NULL;
    }
    const char *data = PyBytes_AS_STRING(bytes), *last = PyBytes_AS_STRING(before);
    Py_ssize_t most = (PyBytes_GET_SIZE(bytes) - place) / SHORTEST;
    PyObject *hashes = PyBytes_FromStringAndSize(NULL, most * HASH);
    if (hashes == NULL)
        return NULL;
    const char *at = data + place, *end;
    unsigned char *to = (unsigned char *)PyBytes_AS_STRING(hashes);
    Line line;
    while (count < most && (end = next_line(at, seq, &line)) != NULL) {
        const char *time = line.values[WHEN].begin + 1;
        /* What concerns the log itself is left to the caller. */
        if (memcmp(last, time, TIME) > 0 || text(line.values[ACTION].begin, "\"log."))
            break;
        if (!hash(0, at, (size_t)(end - at - 1), to + count * HASH)) {
            Py_DECREF(hashes);
            return NULL;
        }
        at = end;
        last = time;
        seq++;
        count++;
    }
    if (_PyBytes_Resize(&hashes, count * HASH) < 0)
        return NULL;
    return Py_BuildValue("nNy#", (Py_ssize_t)(at - data), hashes, last, (Py_ssize_t)TIME);
}

static PyMethodDef methods[] = {
    {"leaf_hashes", leaf_hashes, METH_O, "See hashing.leaf_hashes."},
    {"parents", parents, METH_O, "See hashing.parents."},
    {"take_lines", take_lines, METH_VARARGS,
        "Take the lines of events from a place of the data on, as long as they follow each other: "
        "the first has this seq, and a time not before this one. Returns the place behind them, "
        "their leaf hashes, and the last time. It may stop before any line that is unusual."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "_speedups",
    .m_size = -1,
    .m_methods = methods,
};

PyMODINIT_FUNC PyInit__speedups(void)
{
    context = EVP_MD_CTX_new();
    if (context == NULL || !EVP_DigestInit_ex(context, EVP_sha256(), NULL)) {
        PyErr_SetString(PyExc_ImportError, "OpenSSL has no SHA-256");
        return NULL;
    }
    return PyModule_Create(&definition);
}
