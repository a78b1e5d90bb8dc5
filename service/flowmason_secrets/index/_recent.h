/* Finding events by their columns. */

/* The times in microseconds, and the terms of the fields: two of them are asked for the outcome. */
enum { COLUMNS = 7, TERMS = 7, OF_OUTCOME = 3, OF_NAME = 4, NOT_OUTCOME = 6 };

typedef struct {
    Py_buffer views[COLUMNS];
    int held;
} Columns;

static void release(Columns *columns)
{
    while (columns->held)
        PyBuffer_Release(&columns->views[--columns->held]);
}

/* Hold arrays of at least so many items: of 8 bytes the first, of 4 all others. */
static int hold(Columns *columns, PyObject *arrays, Py_ssize_t count)
{
    for (columns->held = 0; columns->held < COLUMNS; columns->held++) {
        Py_buffer *view = &columns->views[columns->held];
        if (PyObject_GetBuffer(PyTuple_GET_ITEM(arrays, columns->held), view, PyBUF_ND) < 0)
            return 0;
        if (view->itemsize != (columns->held ? 4 : 8) || view->len / view->itemsize < count) {
            PyErr_SetString(PyExc_ValueError, "not a column with as many events");
            PyBuffer_Release(view);
            return 0;
        }
    }
    return 1;
}

static uint32_t term_of(const Columns *columns, int field, Py_ssize_t place)
{
    return ((const uint32_t *)columns->views[1 + field].buf)[place];
}

static int has_terms(const Columns *columns, const long long *terms, Py_ssize_t place)
{
    for (int field = 0; field < COLUMNS - 1; field++)
        if (terms[field] >= 0 && term_of(columns, field, place) != terms[field])
            return 0;
    return terms[NOT_OUTCOME] < 0 || term_of(columns, OF_OUTCOME, place) != terms[NOT_OUTCOME];
}

/* Whether the event has one of the names; -1 if that can't be told. */
static int has_name(const Columns *columns, PyObject *names, Py_ssize_t place)
{
    if (names == Py_None)
        return 1;
    PyObject *name = PyLong_FromUnsignedLong(term_of(columns, OF_NAME, place));
    int found = name == NULL ? -1 : PySet_Contains(names, name);
    Py_XDECREF(name);
    return found;
}

static PyObject *matching(PyObject *module, PyObject *arguments)
{
    (void)module;
    PyObject *arrays, *names;
    long long t[TERMS], since, until;
    Py_ssize_t low, high;
    if (!PyArg_ParseTuple(arguments, "O!(LLLLLLL)O(LL)nn", &PyTuple_Type, &arrays, t, t + 1, t + 2,
            t + 3, t + 4, t + 5, t + 6, &names, &since, &until, &low, &high))
        return NULL;
    if (names != Py_None && !PyAnySet_Check(names)) {
        PyErr_SetString(PyExc_TypeError, "names are a set");
        return NULL;
    }
    if (PyTuple_GET_SIZE(arrays) != COLUMNS || low < 0) {
        PyErr_SetString(PyExc_ValueError, "not the columns, or not a place in them");
        return NULL;
    }
    Columns columns;
    PyObject *found = hold(&columns, arrays, high) ? PyList_New(0) : NULL;
    int done = found != NULL;
    const int64_t *times = done ? columns.views[0].buf : NULL;
    for (Py_ssize_t i = low; done && i < high; i++) {
        if (times[i] < since || times[i] >= until || !has_terms(&columns, t, i))
            continue;
        int named = has_name(&columns, names, i);
        done = named >= 0 && (!named || append(found, PyLong_FromSsize_t(i)));
    }
    release(&columns);
    if (!done)
        Py_CLEAR(found);
    return found;
}
