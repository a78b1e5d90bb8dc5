/* What the events of blocks have in common. Those of a block are a tuple of places, in their order,
   or a bitmap: of more places than FEW. */

#include <stdint.h>

enum { FEW = 64, WIDEST = 8192 };

/* A bitmap, with zeros up to the end of its last word. */
typedef union {
    unsigned char bytes[WIDEST];
    uint64_t words[WIDEST / 8];
} Bitmap;

static PyObject *of_bitmap(const Bitmap *map, size_t size)
{
    Py_ssize_t count = 0, i = 0;
    for (size_t at = 0; at * 8 < size && count <= FEW; at++)
        if (map->words[at])
            count += __builtin_popcountll(map->words[at]);
    if (count > FEW)
        return PyBytes_FromStringAndSize((const char *)map->bytes, (Py_ssize_t)size);
    PyObject *places = PyTuple_New(count);
    for (size_t at = 0; places != NULL && i < count; at++) {
        unsigned char left = map->bytes[at];
        for (; left && places != NULL; left &= (unsigned char)(left - 1)) {
            PyObject *place = PyLong_FromSize_t(at * 8 + (size_t)__builtin_ctz(left));
            if (place == NULL)
                Py_CLEAR(places);
            else
                PyTuple_SET_ITEM(places, i++, place);
        }
    }
    return places;
}

/* Whether others have a place: -1 if it is none. `from` is how many of a tuple's are below it. */
static int has(PyObject *others, PyObject *place, Py_ssize_t *from)
{
    size_t wanted = PyLong_AsSize_t(place);
    if (wanted == (size_t)-1 && PyErr_Occurred())
        return -1;
    if (PyBytes_Check(others)) {
        const char *bits = PyBytes_AS_STRING(others);
        return wanted / 8 < (size_t)PyBytes_GET_SIZE(others) && bits[wanted / 8] >> wanted % 8 & 1;
    }
    for (; *from < PyTuple_GET_SIZE(others); ++*from) {
        size_t other = PyLong_AsSize_t(PyTuple_GET_ITEM(others, *from));
        if (other == (size_t)-1 && PyErr_Occurred())
            return -1;
        if (other >= wanted)
            return other == wanted;
    }
    return 0;
}

/* Those of some places that others have, or that they don't have. */
static PyObject *of_places(PyObject *places, PyObject *others, int common)
{
    Py_ssize_t from = 0, count = 0;
    PyObject *found = PyTuple_New(PyTuple_GET_SIZE(places));
    for (Py_ssize_t i = 0; found != NULL && i < PyTuple_GET_SIZE(places); i++) {
        PyObject *place = PyTuple_GET_ITEM(places, i);
        int there = has(others, place, &from);
        if (there < 0)
            Py_CLEAR(found);
        else if (there == common)
            PyTuple_SET_ITEM(found, count++, Py_NewRef(place));
    }
    if (found != NULL)
        _PyTuple_Resize(&found, count);
    return found;
}

static PyObject *of_bits(PyObject *events, PyObject *others, int common)
{
    Bitmap map, those;
    size_t size = (size_t)PyBytes_GET_SIZE(events), words = (size + 7) / 8;
    if (size > WIDEST || (PyBytes_Check(others) && (size_t)PyBytes_GET_SIZE(others) != size)) {
        PyErr_SetString(PyExc_ValueError, "not bitmaps of one block");
        return NULL;
    }
    memset(map.bytes + size, 0, words * 8 - size);
    memcpy(map.bytes, PyBytes_AS_STRING(events), size);
    if (PyBytes_Check(others)) {
        memset(those.bytes + size, 0, words * 8 - size);
        memcpy(those.bytes, PyBytes_AS_STRING(others), size);
        for (size_t i = 0; common && i < words; i++)
            map.words[i] &= those.words[i];
        for (size_t i = 0; !common && i < words; i++)
            map.words[i] &= ~those.words[i];
        return of_bitmap(&map, size);
    }
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(others); i++) {
        size_t place = PyLong_AsSize_t(PyTuple_GET_ITEM(others, i));
        if (place == (size_t)-1 && PyErr_Occurred())
            return NULL;
        if (place / 8 < size)
            map.bytes[place / 8] &= (unsigned char)~(1 << place % 8);
    }
    return of_bitmap(&map, size);
}

static PyObject *of_both(PyObject *events, PyObject *others, int common)
{
    if (!(PyTuple_Check(others) || PyBytes_Check(others))
        || !(PyTuple_Check(events) || PyBytes_Check(events) || (events == Py_None && common))) {
        PyErr_SetString(PyExc_TypeError, "events are a tuple or bytes");
        return NULL;
    }
    if (events == Py_None)
        return Py_NewRef(others);
    if (PyTuple_Check(events))
        return of_places(events, others, common);
    if (common && PyTuple_Check(others))
        return of_places(others, events, common);
    return of_bits(events, others, common);
}

static PyObject *of_blocks(PyObject *arguments, int common)
{
    PyObject *blocks, *postings, *number, *events;
    Py_ssize_t next = 0;
    if (!PyArg_ParseTuple(arguments, "O!O!", &PyDict_Type, &blocks, &PyDict_Type, &postings))
        return NULL;
    PyObject *found = PyDict_New();
    while (found != NULL && PyDict_Next(blocks, &next, &number, &events)) {
        PyObject *others = PyDict_GetItemWithError(postings, number), *left = NULL;
        if (others != NULL)
            left = of_both(events, others, common);
        else if (!PyErr_Occurred())
            left = common ? PyTuple_New(0) : Py_NewRef(events);
        int none = left != NULL && PyTuple_Check(left) && PyTuple_GET_SIZE(left) == 0;
        if (left == NULL || (!none && PyDict_SetItem(found, number, left) < 0))
            Py_CLEAR(found);
        Py_XDECREF(left);
    }
    return found;
}
