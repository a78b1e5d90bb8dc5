/* Events as they are on the wire, put together from the pieces of their lines. Python does the same
   elsewhere (`shapes.audit_out`), and what is unusual is left to it. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "../core/_lines.h"

enum {
    /* All keys and what else comes from no line. */
    ROOM = 512,
    /* How many details an event has at most. */
    MOST = 16,
};

typedef struct {
    char *at, bytes[2 * LONGEST + ROOM];
} Output;

static void put(Output *to, const char *begin, const char *end)
{
    memcpy(to->at, begin, (size_t)(end - begin));
    to->at += end - begin;
}

static void put_text(Output *to, const char *string)
{
    put(to, string, string + strlen(string));
}

static void put_value(Output *to, const char *key, const Line *line, int field)
{
    put_text(to, key);
    put(to, line->values[field].begin, line->values[field].end);
}

static int is_null(const Line *line, int field)
{
    return *line->values[field].begin == 'n';
}

/* What a line's details have for "error", or else its outcome. NULL if that is no string, or if
   details have a key twice, or one that an event on the wire has anyway. */
static const char *error_of(const Line *line, const char **end)
{
    static const char *taken[] = {"\"name\":", "\"version\":", "\"outcome\":", "\"status\":",
        "\"request_id\":", "\"user_agent\":"};
    struct {
        const char *begin;
        size_t size;
    } keys[MOST];
    const char *error = line->values[OUTCOME].begin, *at = line->values[DETAILS].begin + 1;
    *end = line->values[OUTCOME].end;
    for (size_t count = 0; *at != '}'; count++) {
        if (count == MOST)
            return NULL;
        keys[count].begin = at;
        const char *value = string(at) + 1, *behind = detail(value);
        size_t size = keys[count].size = (size_t)(value - at);
        for (size_t i = 0; i < count; i++)
            if (keys[i].size == size && memcmp(keys[i].begin, at, size) == 0)
                return NULL;
        for (size_t i = 0; i < sizeof taken / sizeof *taken; i++)
            if (text(at, taken[i]))
                return NULL;
        if (text(at, "\"error\":")) {
            if (*value != '"')
                return NULL;
            error = value;
            *end = behind;
        }
        at = *behind == ',' ? behind + 1 : behind;
    }
    return error;
}

static void put_details(Output *to, const Line *line)
{
    put_text(to, ",\"details\":{");
    if (!is_null(line, NAME))
        put_value(to, "\"name\":", line, NAME);
    if (!is_null(line, VERSION))
        put_value(to, is_null(line, NAME) ? "\"version\":" : ",\"version\":", line, VERSION);
    int first = is_null(line, NAME) && is_null(line, VERSION);
    put_value(to, first ? "\"outcome\":" : ",\"outcome\":", line, OUTCOME);
    if (!is_null(line, STATUS))
        put_value(to, ",\"status\":", line, STATUS);
    if (!is_null(line, REQUEST_ID))
        put_value(to, ",\"request_id\":", line, REQUEST_ID);
    if (!is_null(line, USER_AGENT))
        put_value(to, ",\"user_agent\":", line, USER_AGENT);
    const char *begin = line->values[DETAILS].begin + 1, *end = line->values[DETAILS].end;
    if (*begin != '}')
        put_text(to, ",");
    put(to, begin, end);
}

static PyObject *shown(PyObject *module, PyObject *bytes)
{
    (void)module;
    char *data;
    Py_ssize_t size;
    Line line;
    Output to;
    const char *error, *behind;
    if (PyBytes_AsStringAndSize(bytes, &data, &size) < 0)
        return NULL;
    if (read_fields(data, &line) != data + size || (error = error_of(&line, &behind)) == NULL)
        Py_RETURN_NONE;
    to.at = to.bytes;
    put_value(&to, "{\"id\":", &line, ID);
    put_value(&to, ",\"seq\":", &line, SEQ);
    put_value(&to, ",\"timestamp\":", &line, WHEN);
    int is_key = text(line.values[ACTOR_TYPE].begin, "\"api_key\"") != NULL;
    put_value(&to, is_key ? ",\"user_id\":null,\"api_key_id\":" : ",\"user_id\":", &line, ACTOR);
    put_value(&to, is_key ? ",\"action\":" : ",\"api_key_id\":null,\"action\":", &line, ACTION);
    put_value(&to, ",\"resource_type\":", &line, TYPE);
    put_value(&to, ",\"resource_id\":", &line, RESOURCE);
    put_details(&to, &line);
    if (text(line.values[OUTCOME].begin, "\"success\"")) {
        put_text(&to, ",\"success\":true,\"error_message\":null");
    } else {
        put_text(&to, ",\"success\":false,\"error_message\":");
        put(&to, error, behind);
    }
    put_value(&to, ",\"ip_address\":", &line, CLIENT_IP);
    put_text(&to, "}");
    return PyBytes_FromStringAndSize(to.bytes, to.at - to.bytes);
}

static PyMethodDef methods[] = {
    {"shown", shown, METH_O,
        "A line of an event, without its newline, as `entries.encode` gives it; None for some that "
        "are unusual."},
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
