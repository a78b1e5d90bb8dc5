/* Reading events by the column, making postings of the columns, and intersecting them, at the speed
   that long logs ask for. Python does the same elsewhere, and what is unusual is left to it. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "../core/_lines.h"
#include "_blocks.h"

static int two(const char *at)
{
    return (at[0] - '0') * 10 + at[1] - '0';
}

/* Microseconds since the epoch, or -1 if there was no such time, or before it. */
static long long microseconds(const char *time)
{
    static const int before[] = {0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334, 365};
    int year = two(time) * 100 + two(time + 2), month = two(time + 5), day = two(time + 8);
    int hour = two(time + 11), minute = two(time + 14), second = two(time + 17);
    int leap = (year % 4 == 0 && year % 100 != 0) || year % 400 == 0;
    if (year < 1970 || month < 1 || month > 12 || day < 1 || hour > 23 || minute > 59 || second > 59
        || day > before[month] - before[month - 1] + (leap && month == 2))
        return -1;
    long long past = year - 1;
    long long days = past * 365 + past / 4 - past / 100 + past / 400 - 719162;
    days += before[month - 1] + (leap && month > 2) + day - 1;
    long long seconds = ((days * 24 + hour) * 60 + minute) * 60 + second;
    return seconds * 1000000 + strtoll(time + 20, NULL, 10);
}

/* What mappings gave for values. The same few come again and again, and looking them up by their
   bytes takes a fraction of the time that it takes to make strings of them. */
enum { SLOTS = 4096 };

typedef struct {
    const char *value;
    PyObject *mapping, *found;
} Slot;

typedef struct {
    /* Owns what was found. */
    PyObject *kept;
    Slot slots[SLOTS];
} Memory;

static PyObject *look_up(PyObject *mapping, const char *value, size_t size)
{
    PyObject *key = *value == 'n' ? Py_NewRef(Py_None)
                                  : PyUnicode_FromStringAndSize(value + 1, (Py_ssize_t)size - 2);
    PyObject *found = key == NULL ? NULL : PyObject_GetItem(mapping, key);
    Py_XDECREF(key);
    return found;
}

/* What the mapping has for a value of the line: borrowed, NULL if that fails. */
static PyObject *item_of(Memory *memory, PyObject *mapping, const Line *line, int field)
{
    const char *value = line->values[field].begin;
    size_t size = (size_t)(line->values[field].end - value), hash = (size_t)mapping >> 4;
    for (size_t i = 0; i < size; i++)
        hash = hash * 31 + (unsigned char)value[i];
    Slot *slot = &memory->slots[(hash ^ hash >> 12) % SLOTS];
    /* It came before, so there is as much behind it; and no value is the beginning of another. */
    if (slot->mapping == mapping && memcmp(slot->value, value, size) == 0)
        return slot->found;
    PyObject *found = look_up(mapping, value, size);
    if (found == NULL || PyList_Append(memory->kept, found) < 0) {
        Py_XDECREF(found);
        return NULL;
    }
    Py_DECREF(found);
    *slot = (Slot){value, mapping, found};
    return found;
}

/* Append an item that is given away; 0 if that, or making it, has failed. */
static int append(PyObject *list, PyObject *item)
{
    int failed = item == NULL || PyList_Append(list, item) < 0;
    Py_XDECREF(item);
    return !failed;
}

static int append_terms(PyObject **columns, PyObject **known, const Line *line, Memory *memory)
{
    static const int indexed[] = {ORG, TYPE, ACTION, OUTCOME, NAME, ACTOR};
    for (int i = 0; i < 6; i++) {
        PyObject *mapping = known[i];
        /* Names have terms of their own in each organisation. */
        if (indexed[i] == NAME && (mapping = item_of(memory, mapping, line, ORG)) == NULL)
            return 0;
        PyObject *term = item_of(memory, mapping, line, indexed[i]);
        if (term == NULL || PyList_Append(columns[i], term) < 0)
            return 0;
    }
    return 1;
}

static PyObject *read_columns(PyObject *module, PyObject *arguments)
{
    (void)module;
    PyObject *bytes, *known[6], *columns[8];
    Py_ssize_t place;
    long long seq, when;
    if (!PyArg_ParseTuple(arguments, "SnL(OOOOOO)", &bytes, &place, &seq, known, known + 1,
            known + 2, known + 3, known + 4, known + 5))
        return NULL;
    if (place < 0 || place > PyBytes_GET_SIZE(bytes)) {
        PyErr_SetString(PyExc_ValueError, "not a place in the data");
        return NULL;
    }
    PyObject *made = PyList_New(8), *kept = PyList_New(0);
    Memory *memory = PyMem_Calloc(1, sizeof *memory);
    int done = made != NULL && kept != NULL && memory != NULL;
    for (int i = 0; done && i < 8; i++) {
        columns[i] = PyList_New(0);
        done = columns[i] != NULL && PyList_SetItem(made, i, columns[i]) == 0;
    }
    if (done)
        memory->kept = kept;
    const char *data = PyBytes_AS_STRING(bytes), *at = data + place, *end;
    Line line;
    for (; done && (end = next_line(at, seq, &line)) != NULL; at = end, seq++) {
        if ((when = microseconds(line.values[WHEN].begin + 1)) < 0)
            break;
        done = append(columns[0], PyLong_FromSsize_t(at - data))
            && append(columns[1], PyLong_FromLongLong(when))
            && append_terms(columns + 2, known, &line, memory);
    }
    if (memory == NULL)
        PyErr_NoMemory();
    PyMem_Free(memory);
    Py_XDECREF(kept);
    if (!done)
        Py_CLEAR(made);
    return made == NULL ? NULL : Py_BuildValue("nN", (Py_ssize_t)(at - data), made);
}

/* Memory for `postings`, of as many as there are events. */
typedef struct {
    uint32_t *codes, *counts, *ends;
    uint16_t *places, *grouped;
} Work;

/* Number the terms in the order in which they come, and count them; -1 if that fails. */
static Py_ssize_t number_terms(PyObject *column, PyObject *terms, Work *work)
{
    PyObject *numbers = PyDict_New();
    Py_ssize_t count = PySequence_Fast_GET_SIZE(column);
    for (Py_ssize_t i = 0; numbers != NULL && i < count; i++) {
        PyObject *term = PySequence_Fast_GET_ITEM(column, i);
        PyObject *number = PyDict_GetItemWithError(numbers, term);
        if (number == NULL && !PyErr_Occurred()) {
            number = PyLong_FromSsize_t(PyList_GET_SIZE(terms));
            work->counts[PyList_GET_SIZE(terms)] = 0;
            if (number != NULL && (PyDict_SetItem(numbers, term, number) < 0
                                   || PyList_Append(terms, term) < 0))
                Py_CLEAR(number);
            Py_XDECREF(number);
        }
        if (number == NULL) {
            Py_CLEAR(numbers);
            break;
        }
        work->codes[i] = (uint32_t)PyLong_AsUnsignedLong(number);
        work->counts[work->codes[i]]++;
    }
    Py_XDECREF(numbers);
    return numbers == NULL ? -1 : PyList_GET_SIZE(terms);
}

/* A few places, two bytes each, or a bitmap; nothing for a whole block. */
static PyObject *posting(const uint16_t *places, size_t count, size_t block, size_t few)
{
    size_t size = count == block ? 0 : count <= few ? 2 * count : block / 8;
    PyObject *made = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)size);
    if (made == NULL || size == 0)
        return made;
    unsigned char *to = (unsigned char *)PyBytes_AS_STRING(made);
    memset(to, 0, size);
    for (size_t i = 0; i < count; i++) {
        if (count > few) {
            to[places[i] >> 3] |= (unsigned char)(1 << (places[i] & 7));
        } else {
            to[2 * i] = (unsigned char)(places[i] & 0xff);
            to[2 * i + 1] = (unsigned char)(places[i] >> 8);
        }
    }
    return made;
}

static PyObject *postings_of(PyObject *column, Work *work, size_t block, size_t few)
{
    Py_ssize_t count = PySequence_Fast_GET_SIZE(column);
    PyObject *found = PyDict_New(), *terms = PyList_New(0);
    Py_ssize_t known = found == NULL || terms == NULL ? -1 : number_terms(column, terms, work);
    uint32_t start = 0;
    for (Py_ssize_t i = 0; i < known; start += work->counts[i++])
        work->ends[i] = start;
    for (Py_ssize_t i = 0; known >= 0 && i < count; i++)
        work->grouped[work->ends[work->codes[i]]++] = work->places[i];
    for (Py_ssize_t i = 0; known >= 0 && i < known; i++) {
        size_t events = work->counts[i];
        PyObject *made = posting(work->grouped + work->ends[i] - events, events, block, few);
        if (made == NULL || PyDict_SetItem(found, PyList_GET_ITEM(terms, i), made) < 0)
            known = -1;
        Py_XDECREF(made);
    }
    Py_XDECREF(terms);
    if (known < 0)
        Py_CLEAR(found);
    return found;
}

static PyObject *postings(PyObject *module, PyObject *arguments)
{
    (void)module;
    PyObject *column, *places, *found = NULL;
    unsigned int block, few;
    if (!PyArg_ParseTuple(arguments, "OOII", &column, &places, &block, &few))
        return NULL;
    column = PySequence_Fast(column, "a sequence of terms is needed");
    places = column == NULL ? NULL : PySequence_Fast(places, "a sequence of places is needed");
    size_t count = places == NULL ? 0 : (size_t)PySequence_Fast_GET_SIZE(places), i = 0;
    /* One piece for all of them; the wider ones come first. */
    uint32_t *memory = PyMem_Malloc(count * (3 * sizeof(uint32_t) + 2 * sizeof(uint16_t)) + 1);
    if (places == NULL || memory == NULL)
        goto done;
    Work work = {memory, memory + count, memory + 2 * count, NULL, NULL};
    work.places = (uint16_t *)(memory + 3 * count);
    work.grouped = work.places + count;
    for (; i < count; i++) {
        unsigned long place = PyLong_AsUnsignedLong(PySequence_Fast_GET_ITEM(places, (Py_ssize_t)i));
        if (PyErr_Occurred() || place >= block)
            break;
        work.places[i] = (uint16_t)place;
    }
    if (i == count && count == (size_t)PySequence_Fast_GET_SIZE(column) && count <= block
        && block <= 1 << 16)
        found = postings_of(column, &work, block, few);
    else if (!PyErr_Occurred())
        PyErr_SetString(PyExc_ValueError, "not as many places in the block as terms");
done:
    if (memory == NULL)
        PyErr_NoMemory();
    PyMem_Free(memory);
    Py_XDECREF(column);
    Py_XDECREF(places);
    return found;
}

static PyObject *among(PyObject *module, PyObject *arguments)
{
    (void)module;
    return of_blocks(arguments, 1);
}

static PyObject *without(PyObject *module, PyObject *arguments)
{
    (void)module;
    return of_blocks(arguments, 0);
}

enum { WANTED = 7 };

typedef struct {
    const char *value;
    Py_ssize_t size;
} Token;

/* Whether a line is an event as wanted; another outcome than `wanted[4]`. */
static int is_wanted(const Line *line, const Token *wanted)
{
    static const int asked[WANTED] = {ORG, TYPE, ACTION, OUTCOME, OUTCOME, NAME, ACTOR};
    for (int i = 0; i < WANTED; i++) {
        if (wanted[i].value == NULL)
            continue;
        const char *value = line->values[asked[i]].begin;
        Py_ssize_t size = line->values[asked[i]].end - value;
        int same = size == wanted[i].size && memcmp(value, wanted[i].value, (size_t)size) == 0;
        if (same != (i != 4))
            return 0;
    }
    return 1;
}

/* Whether a line is the event with this seq, as wanted; adds its name. -1 if that fails. */
static int is_like(PyObject *bytes, PyObject *number, const Token *wanted, PyObject *names)
{
    Line line;
    long long seq = PyLong_AsLongLong(number);
    if (seq == -1 && PyErr_Occurred())
        return -1;
    if (!PyBytes_Check(bytes)) {
        PyErr_SetString(PyExc_TypeError, "a line is bytes");
        return -1;
    }
    const char *data = PyBytes_AS_STRING(bytes), *end = read_fields(data, &line);
    if (end != data + PyBytes_GET_SIZE(bytes) || seq_of(&line) != seq || !is_wanted(&line, wanted))
        return 0;
    const char *name = line.values[NAME].begin;
    PyObject *token = PyBytes_FromStringAndSize(name, line.values[NAME].end - name);
    int failed = token == NULL || PySet_Add(names, token) < 0;
    Py_XDECREF(token);
    return failed ? -1 : 1;
}

static PyObject *unlike(PyObject *module, PyObject *arguments)
{
    (void)module;
    PyObject *lines, *seqs;
    Token w[WANTED];
    if (!PyArg_ParseTuple(arguments, "O!O!(z#z#z#z#z#z#z#)", &PyList_Type, &lines, &PyList_Type,
            &seqs, &w[0].value, &w[0].size, &w[1].value, &w[1].size, &w[2].value, &w[2].size,
            &w[3].value, &w[3].size, &w[4].value, &w[4].size, &w[5].value, &w[5].size, &w[6].value,
            &w[6].size))
        return NULL;
    if (PyList_GET_SIZE(lines) != PyList_GET_SIZE(seqs)) {
        PyErr_SetString(PyExc_ValueError, "not as many seqs as lines");
        return NULL;
    }
    PyObject *places = PyList_New(0), *names = PySet_New(NULL);
    int done = places != NULL && names != NULL;
    for (Py_ssize_t i = 0; done && i < PyList_GET_SIZE(lines); i++) {
        int like = is_like(PyList_GET_ITEM(lines, i), PyList_GET_ITEM(seqs, i), w, names);
        done = like >= 0 && (like || append(places, PyLong_FromSsize_t(i)));
    }
    if (done)
        return Py_BuildValue("NN", places, names);
    Py_XDECREF(places);
    Py_XDECREF(names);
    return NULL;
}

static PyObject *any_of(PyObject *module, PyObject *arguments)
{
    (void)module;
    return of_any(arguments);
}

#include "_recent.h"

static PyMethodDef methods[] = {
    {"among", among, METH_VARARGS, "See plain.among."},
    {"without", without, METH_VARARGS, "See plain.without."},
    {"union", any_of, METH_VARARGS, "See plain.union."},
    {"read_columns", read_columns, METH_VARARGS,
        "Read the lines of events from a place of the data on, as long as they follow each other: "
        "the first has this seq. Returns the place behind them, and lists: their places, their "
        "times in microseconds, and the terms that the mappings have for what is indexed of them; "
        "for a name it is a mapping of organisations to mappings. It may stop before any line."},
    {"postings", postings, METH_VARARGS,
        "The postings of a column, by their terms. The places of its events in the block ascend; "
        "up to so few of them are encoded as places, and more as a bitmap."},
    {"matching", matching, METH_VARARGS, "See plain.matching."},
    {"unlike", unlike, METH_VARARGS,
        "Which of some lines are not known to be the events with these seqs, or not known to be as "
        "wanted, by their places in the list; and the names that all others have, in JSON. It may "
        "leave any line to the caller."},
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
    return PyModule_Create(&definition);
}
