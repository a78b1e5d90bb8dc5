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

static int has(const Bitmap *map, size_t place)
{
    return map->bytes[place / 8] >> place % 8 & 1;
}

/* The events of a block, of either kind. Returns 0 if that is not what they are. */
static int to_bitmap(PyObject *events, size_t size, Bitmap *map)
{
    const unsigned char *data = (const unsigned char *)PyBytes_AS_STRING(events);
    size_t length = (size_t)PyBytes_GET_SIZE(events);
    memset(map->bytes, 0, (size + 7) / 8 * 8);
    if (length == size) {
        memcpy(map->bytes, data, size);
        return 1;
    }
    int valid = length % 2 == 0 && length < size;
    for (size_t i = 0; valid && i < length; i += 2) {
        size_t place = place_at(data + i);
        if ((valid = place / 8 < size))
            map->bytes[place / 8] |= (unsigned char)(1 << place % 8);
    }
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

/* Those of some places that a bitmap has, or that it doesn't have. */
static PyObject *of_places(PyObject *events, const Bitmap *map, int common)
{
    const unsigned char *data = (const unsigned char *)PyBytes_AS_STRING(events);
    unsigned char places[2 * FEW];
    size_t end = 0;
    for (Py_ssize_t i = 0; i < PyBytes_GET_SIZE(events); i += 2)
        if (has(map, place_at(data + i)) == common) {
            places[end++] = data[i];
            places[end++] = data[i + 1];
        }
    return PyBytes_FromStringAndSize((const char *)places, (Py_ssize_t)end);
}

static PyObject *of_both(PyObject *events, PyObject *others, size_t size, int common)
{
    Bitmap map, those;
    if (!PyBytes_Check(others) || !(PyBytes_Check(events) || (events == Py_None && common))) {
        PyErr_SetString(PyExc_TypeError, "events are bytes");
        return NULL;
    }
    if (!to_bitmap(others, size, &those)
        || (events != Py_None && !to_bitmap(events, size, &map))) {
        PyErr_SetString(PyExc_ValueError, "not events of a block");
        return NULL;
    }
    if (events == Py_None)
        return Py_NewRef(others);
    int few = (size_t)PyBytes_GET_SIZE(events) <= 2 * few_of(size);
    if (few && (size_t)PyBytes_GET_SIZE(events) != size)
        return of_places(events, &those, common);
    for (size_t i = 0; i * 8 < size; i++)
        map.words[i] &= common ? those.words[i] : ~those.words[i];
    return of_bitmap(&map, size);
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
