/* What the events of blocks have in common. Those of a block are two bytes for each of a few places,
   the lowest first, or a bitmap; which of them, its size tells. */

#include <stdint.h>

enum { FEW = 512, WIDEST = 8192 };

/* A bitmap, with zeros up to the end of its last word. */
typedef union {
    unsigned char bytes[WIDEST];
    uint64_t words[WIDEST / 8];
} Bitmap;

/* Of how many events there are places, if a bitmap has this size. */
static size_t few_of(size_t size)
{
    return (size - 1) / 2 < FEW ? (size - 1) / 2 : FEW;
}

static size_t place_at(const unsigned char *places)
{
    return (size_t)places[0] | (size_t)places[1] << 8;
}

/* A posting as it was given. */
typedef struct {
    const unsigned char *bytes;
    size_t length;
    int is_bitmap;
} Posting;

static int has(const unsigned char *bitmap, size_t place)
{
    return bitmap[place / 8] >> place % 8 & 1;
}

/* Returns 0 if it is not one of events of a block. */
static int to_posting(PyObject *events, size_t size, Posting *posting)
{
    posting->bytes = (const unsigned char *)PyBytes_AS_STRING(events);
    posting->length = (size_t)PyBytes_GET_SIZE(events);
    posting->is_bitmap = posting->length == size;
    int valid = posting->is_bitmap
                || (posting->length % 2 == 0 && posting->length <= 2 * few_of(size));
    for (size_t i = 0; valid && !posting->is_bitmap && i < posting->length; i += 2)
        valid = place_at(posting->bytes + i) / 8 < size;
    return valid;
}

static PyObject *of_bitmap(const Bitmap *map, size_t size)
{
    unsigned char places[2 * FEW];
    size_t count = 0, few = few_of(size), end = 0;
    for (size_t i = 0; i * 8 < size && count <= few; i++)
        if (map->words[i])
            count += (size_t)__builtin_popcountll(map->words[i]);
    if (count > few)
        return PyBytes_FromStringAndSize((const char *)map->bytes, (Py_ssize_t)size);
    for (size_t i = 0; end < 2 * count; i++)
        for (unsigned char left = map->bytes[i]; left; left &= (unsigned char)(left - 1)) {
            size_t place = i * 8 + (size_t)__builtin_ctz(left);
            places[end++] = (unsigned char)(place & 0xff);
            places[end++] = (unsigned char)(place >> 8);
        }
    return PyBytes_FromStringAndSize((const char *)places, (Py_ssize_t)end);
}

static void add_places(Bitmap *map, const Posting *events)
{
    for (size_t i = 0; i < events->length; i += 2) {
        size_t place = place_at(events->bytes + i);
        map->bytes[place / 8] |= (unsigned char)(1 << place % 8);
    }
}

static void add_bits(Bitmap *map, const Posting *events)
{
    for (size_t i = 0; i < events->length; i++)
        map->bytes[i] |= events->bytes[i];
}

/* Those of some places that a bitmap has, or that it doesn't have. */
static PyObject *of_places(const Posting *events, const unsigned char *bitmap, int common)
{
    unsigned char places[2 * FEW];
    size_t end = 0;
    for (size_t i = 0; i < events->length; i += 2)
        if (has(bitmap, place_at(events->bytes + i)) == common) {
            places[end++] = events->bytes[i];
            places[end++] = events->bytes[i + 1];
        }
    return PyBytes_FromStringAndSize((const char *)places, (Py_ssize_t)end);
}

/* Those of a bitmap that another has, or that it doesn't have. */
static PyObject *of_bits(const Posting *events, const unsigned char *others, int common)
{
    Bitmap map;
    size_t size = events->length;
    map.words[(size - 1) / 8] = 0;
    memcpy(map.bytes, events->bytes, size);
    for (size_t i = 0; i * 8 < size; i++) {
        uint64_t word = 0;
        memcpy(&word, others + i * 8, size - i * 8 < 8 ? size - i * 8 : 8);
        map.words[i] &= common ? word : ~word;
    }
    return of_bitmap(&map, size);
}

static PyObject *of_both(PyObject *events, PyObject *others, size_t size, int common)
{
    Posting one = {NULL, 0, 0}, other;
    Bitmap map;
    int every = events == Py_None && common;
    if (!PyBytes_Check(others) || !(PyBytes_Check(events) || every)) {
        PyErr_SetString(PyExc_TypeError, "events are bytes");
        return NULL;
    }
    if (!to_posting(others, size, &other) || !(every || to_posting(events, size, &one))) {
        PyErr_SetString(PyExc_ValueError, "not events of a block");
        return NULL;
    }
    if (every)
        return Py_NewRef(others);
    if (common && one.is_bitmap && !other.is_bitmap)
        return of_places(&other, one.bytes, common);
    if (!other.is_bitmap) {
        memset(map.bytes, 0, size);
        add_places(&map, &other);
        other.bytes = map.bytes;
    }
    return (one.is_bitmap ? of_bits : of_places)(&one, other.bytes, common);
}

static PyObject *of_any(PyObject *arguments)
{
    PyObject *postings;
    Posting one;
    Bitmap map;
    Py_ssize_t size;
    if (!PyArg_ParseTuple(arguments, "O!n", &PyList_Type, &postings, &size))
        return NULL;
    if (size < 1 || size > WIDEST) {
        PyErr_SetString(PyExc_ValueError, "no size of a bitmap");
        return NULL;
    }
    memset(map.bytes, 0, ((size_t)size + 7) / 8 * 8);
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(postings); i++) {
        PyObject *events = PyList_GET_ITEM(postings, i);
        if (!PyBytes_Check(events) || !to_posting(events, (size_t)size, &one)) {
            PyErr_SetString(PyExc_ValueError, "not events of a block");
            return NULL;
        }
        (one.is_bitmap ? add_bits : add_places)(&map, &one);
    }
    return of_bitmap(&map, (size_t)size);
}

static PyObject *of_blocks(PyObject *arguments, int common)
{
    PyObject *blocks, *postings, *number, *events;
    Py_ssize_t next = 0, size;
    if (!PyArg_ParseTuple(arguments, "O!O!n", &PyDict_Type, &blocks, &PyDict_Type, &postings, &size))
        return NULL;
    if (size < 1 || size > WIDEST) {
        PyErr_SetString(PyExc_ValueError, "no size of a bitmap");
        return NULL;
    }
    PyObject *found = PyDict_New();
    while (found != NULL && PyDict_Next(blocks, &next, &number, &events)) {
        PyObject *others = PyDict_GetItemWithError(postings, number), *left = NULL;
        if (others != NULL)
            left = of_both(events, others, (size_t)size, common);
        else if (!PyErr_Occurred())
            left = common ? PyBytes_FromStringAndSize(NULL, 0) : Py_NewRef(events);
        int none = left != NULL && PyBytes_Check(left) && PyBytes_GET_SIZE(left) == 0;
        if (left == NULL || (!none && PyDict_SetItem(found, number, left) < 0))
            Py_CLEAR(found);
        Py_XDECREF(left);
    }
    return found;
}
