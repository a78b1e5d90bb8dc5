/* What hashing.py does, and the check of event lines, at the speed that long logs ask for.
   SHA-256 is OpenSSL's. The format of lines is in FORMAT.md §5.1, hashing in RFC 6962 §2.1. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <openssl/evp.h>
#include <string.h>

enum {
    HASH = 32,
    TIME = 27,
    /* Longer lines are left to the caller; so are numbers with more digits. */
    LONGEST = 4096,
    DIGITS = 15,
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

/* Each of these takes a place in a line and returns the place behind what it stands for, or NULL if
   that is not there. What they read ends in a NUL, which none of them accepts. */

static const char *text(const char *at, const char *wanted)
{
    size_t length = strlen(wanted);
    return strncmp(at, wanted, length) == 0 ? at + length : NULL;
}

/* Only of printable ASCII, without escapes: nearly all strings are. */
static const char *string(const char *at)
{
    if (*at++ != '"')
        return NULL;
    while (*at >= ' ' && *at < 0x7f && *at != '"' && *at != '\\')
        at++;
    return *at == '"' ? at + 1 : NULL;
}

static const char *maybe_string(const char *at)
{
    return *at == 'n' ? text(at, "null") : string(at);
}

static const char *number(const char *at)
{
    const char *begin = at;
    while (*at >= '0' && *at <= '9')
        at++;
    if (at == begin || at - begin > DIGITS || (*begin == '0' && at - begin > 1))
        return NULL;
    return at;
}

static const char *maybe_number(const char *at)
{
    return *at == 'n' ? text(at, "null") : number(at);
}

static const char *time_of(const char *at)
{
    for (const char *form = "\"0000-00-00T00:00:00.000000Z\""; *form; form++, at++)
        if (*form == '0' ? *at < '0' || *at > '9' : *at != *form)
            return NULL;
    return at;
}

/* Those of `log.` concern the log itself: they are left to the caller. */
static const char *action(const char *at)
{
    return text(at, "\"log.") ? NULL : string(at);
}

static const char *outcome(const char *at)
{
    static const char *known[]
        = {"\"success\"", "\"denied\"", "\"not_found\"", "\"expired\"", "\"failed\""};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        const char *end = text(at, known[i]);
        if (end != NULL)
            return end;
    }
    return NULL;
}

static const char *strings(const char *at)
{
    if (*at == ']')
        return at + 1;
    while ((at = string(at)) != NULL && *at == ',')
        at++;
    return at != NULL && *at == ']' ? at + 1 : NULL;
}

static const char *detail(const char *at)
{
    switch (*at) {
    case '"':
        return string(at);
    case '[':
        return strings(at + 1);
    case 'n':
        return text(at, "null");
    case 't':
        return text(at, "true");
    case 'f':
        return text(at, "false");
    }
    return number(at);
}

static const char *details(const char *at)
{
    if (*at++ != '{')
        return NULL;
    if (*at == '}')
        return at + 1;
    while ((at = string(at)) != NULL && *at == ':' && (at = detail(at + 1)) != NULL && *at == ',')
        at++;
    return at != NULL && *at == '}' ? at + 1 : NULL;
}

static const struct {
    const char *key;
    const char *(*value)(const char *);
} fields[] = {
    {"{\"v\":1,\"id\":", string},
    {",\"seq\":", number},
    {",\"time\":", time_of},
    {",\"action\":", action},
    {",\"outcome\":", outcome},
    {",\"org_id\":", maybe_string},
    {",\"resource_type\":", string},
    {",\"resource_id\":", maybe_string},
    {",\"name\":", maybe_string},
    {",\"version\":", maybe_number},
    {",\"actor\":", maybe_string},
    {",\"actor_type\":", string},
    {",\"client_ip\":", maybe_string},
    {",\"user_agent\":", maybe_string},
    {",\"request_id\":", maybe_string},
    {",\"status\":", maybe_number},
    {",\"details\":", details},
};

/* A line; its number and its time are put where the others point to. */
static const char *line(const char *at, long long *seq, const char **time)
{
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++) {
        const char *value = text(at, fields[i].key);
        at = value == NULL ? NULL : fields[i].value(value);
        if (at == NULL)
            return NULL;
        if (fields[i].value == number)
            *seq = strtoll(value, NULL, 10);
        else if (fields[i].value == time_of)
            *time = value + 1;
    }
    return text(at, "}\n");
}

static PyObject *take_lines(PyObject *module, PyObject *arguments)
{
    (void)module;
    PyObject *bytes, *before;
    Py_ssize_t place, count = 0;
    long long expected, seq = 0;
    if (!PyArg_ParseTuple(arguments, "SnLS", &bytes, &place, &expected, &before))
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
    const char *at = data + place, *end, *time = NULL;
    unsigned char *to = (unsigned char *)PyBytes_AS_STRING(hashes);
    while (count < most && (end = line(at, &seq, &time)) != NULL && seq == expected
           && memcmp(last, time, TIME) <= 0 && end - at <= LONGEST) {
        if (!hash(0, at, (size_t)(end - at - 1), to + count * HASH)) {
            Py_DECREF(hashes);
            return NULL;
        }
        at = end;
        last = time;
        expected++;
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
