/* Reading the lines of events: those that are as nearly all are. FORMAT.md §5.1 */

#include <stdlib.h>
#include <string.h>

enum {
    TIME = 27,
    /* Neither longer lines are read nor numbers with more digits. */
    LONGEST = 4096,
    DIGITS = 15,
};

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

enum {
    ID, SEQ, WHEN, ACTION, OUTCOME, ORG, TYPE, RESOURCE, NAME, VERSION, ACTOR, ACTOR_TYPE,
    CLIENT_IP, USER_AGENT, REQUEST_ID, STATUS, DETAILS, FIELDS,
};

static const struct {
    const char *key;
    const char *(*value)(const char *);
} fields[FIELDS] = {
    {"{\"v\":1,\"id\":", string},
    {",\"seq\":", number},
    {",\"time\":", time_of},
    {",\"action\":", string},
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

/* The values of a line, as they stand in it. */
typedef struct {
    struct {
        const char *begin, *end;
    } values[FIELDS];
} Line;

/* A line up to its newline. */
static const char *read_fields(const char *at, Line *line)
{
    const char *begin = at;
    for (int i = 0; i < FIELDS; i++) {
        if ((at = text(at, fields[i].key)) == NULL)
            return NULL;
        line->values[i].begin = at;
        if ((at = fields[i].value(at)) == NULL)
            return NULL;
        line->values[i].end = at;
    }
    at = text(at, "}");
    return at != NULL && at - begin < LONGEST ? at : NULL;
}

/* No such number is longer than DIGITS allows. */
static long long seq_of(const Line *line)
{
    return strtoll(line->values[SEQ].begin, NULL, 10);
}

/* A line that others follow, with this seq: up to the next one. */
static inline const char *next_line(const char *at, long long seq, Line *line)
{
    at = read_fields(at, line);
    return at != NULL && *at == '\n' && seq_of(line) == seq ? at + 1 : NULL;
}
