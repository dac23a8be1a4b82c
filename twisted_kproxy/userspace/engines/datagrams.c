/*
 * UDP in batches: datagrams of known flows go both ways without Python. Whatever needs a decision (a client that is not
 * known, an endpoint that refuses) is asked about: udp_run() returns, Python decides, and calls it again to go on where
 * it was. All calls come from one thread.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <linux/errqueue.h>
#include <netinet/in.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

#ifndef UDP_SEGMENT
#define UDP_SEGMENT 103
#endif
#ifndef UDP_GRO
#define UDP_GRO 104
#endif
#ifndef SOL_UDP
#define SOL_UDP 17
#endif

#define SLOTS 64                 /* datagrams (or trains of them) taken and sent at a time */
#define LARGEST 65535
#define STRIDE (65536 + 192)     /* were it a power of two, the beginnings of all would compete for one place in the cache */
#define CONTROL 128
#define EVENTS 256
#define SHARE 512                /* datagrams per call of udp_run(), so that nothing else waits for long */
#define TURN 64                  /* errors read from one socket at a time */
#define KEPT 1500

enum { TOO_LONG, BUSY, ERROR, REASONS };
enum { UNKNOWN = 1, UNSENT, REPORTED };
enum { OFFLOAD_IN = 1, OFFLOAD_OUT = 2 };

/* What tells one flow from another, in a form that can be compared by its bytes. */
struct key {
    unsigned char address[16];
    uint32_t scope;
    uint16_t port;               /* of the host's order */
    unsigned char six, dialledSize;
    unsigned char dialled[24];   /* in_pktinfo or in6_pktinfo of a reply */
};

struct watched {
    int fd;                      /* -1 for none */
    int isService;
};

struct service;

struct flow {
    struct watched watched;
    struct service *service;     /* NULL while it is in no table */
    struct flow *chain;
    struct flow *newer, *older;  /* by last use, among those that were answered, or those that were not */
    struct key key;
    uint64_t hash;
    double used;
    uint64_t sent, received;     /* bytes */
    char *kept;                  /* the last datagram sent, while nothing has come back since */
    int keptSize;                /* -1 for none */
    uint32_t serial;             /* of the batch that it was last in, and */
    int last;                    /* its last datagram in there */
    unsigned char answered, stale;
    unsigned char plain, plainBack; /* trains do not get through in one piece */
};

struct service {
    struct watched watched;
    struct flow **buckets;
    size_t mask, count, unansweredCount;
    struct flow unanswered, answered; /* rings; these two are no flows */
    uint64_t sentCount, sentBytes, receivedCount, receivedBytes;
    uint64_t dropped[REASONS];
};

struct ask {
    int what;
    struct service *service;
    struct flow *flow;           /* NULL for UNKNOWN */
    int number;
    struct key *key;
    char *data;
    size_t size;
};

struct calls {
    int (*receive)(int, struct mmsghdr *, unsigned, int);
    int (*send)(int, struct mmsghdr *, unsigned, int);
};

struct inbox {
    struct mmsghdr messages[SLOTS];
    struct iovec vectors[SLOTS];
    char control[SLOTS][CONTROL] __attribute__((aligned(8)));
    struct sockaddr_in6 names[SLOTS];
    char *buffers;
};

struct outbox {
    struct mmsghdr messages[SLOTS];
    struct iovec vectors[SLOTS];
    char control[SLOTS][CONTROL] __attribute__((aligned(8)));
    struct sockaddr_in6 names[SLOTS];
    struct flow *flows[SLOTS];
    int from[SLOTS];             /* which datagram of the batch */
    unsigned segment[SLOTS];     /* of a train; 0 for a single datagram */
    int count;
};

struct datagram {
    struct key key;
    uint64_t hash;
    char *data;
    size_t size, done;
    unsigned segment;
    int next;                    /* of the same flow, in this batch; -1 for none */
};

struct todo {
    int index, number;
};

typedef struct engine {
    int epoll, offload, running;
    long budget;
    double now;
    uint64_t secret[2];
    uint32_t serial;
    struct calls calls;
    struct watched **byFd;
    size_t fdRoom;
    struct epoll_event events[EVENTS];
    int eventCount, eventNext;
    struct inbox in, back;       /* from clients; from endpoints */
    struct outbox out, replies;  /* to an endpoint; to clients */
    struct service *repliesOf, *batchOf;
    struct datagram batch[SLOTS];
    struct todo todo[SLOTS + 1];
    int todoCount, todoNext;
} engine;

static int kernelReceive(int fd, struct mmsghdr *messages, unsigned count, int flags)
{
    return recvmmsg(fd, messages, count, flags | MSG_DONTWAIT, NULL);
}

static int kernelSend(int fd, struct mmsghdr *messages, unsigned count, int flags)
{
    return sendmmsg(fd, messages, count, flags | MSG_DONTWAIT | MSG_NOSIGNAL);
}

/* --- flows by key: SipHash-1-3, as clients choose their own ports and addresses */

static uint64_t rotated(uint64_t it, int by)
{
    return it << by | it >> (64 - by);
}

static void sipRound(uint64_t v[4])
{
    v[0] += v[1]; v[1] = rotated(v[1], 13); v[1] ^= v[0]; v[0] = rotated(v[0], 32);
    v[2] += v[3]; v[3] = rotated(v[3], 16); v[3] ^= v[2];
    v[0] += v[3]; v[3] = rotated(v[3], 21); v[3] ^= v[0];
    v[2] += v[1]; v[1] = rotated(v[1], 17); v[1] ^= v[2]; v[2] = rotated(v[2], 32);
}

static uint64_t hashOf(const engine *e, const struct key *key)
{
    uint64_t words[sizeof *key / 8];
    uint64_t v[4] = {
        e->secret[0] ^ 0x736f6d6570736575u, e->secret[1] ^ 0x646f72616e646f6du,
        e->secret[0] ^ 0x6c7967656e657261u, e->secret[1] ^ 0x7465646279746573u,
    };
    memcpy(words, key, sizeof words);
    for (size_t i = 0; i < sizeof words / 8; i++) {
        v[3] ^= words[i];
        sipRound(v);
        v[0] ^= words[i];
    }
    v[2] ^= 0xff;
    for (int i = 0; i < 3; i++)
        sipRound(v);
    return v[0] ^ v[1] ^ v[2] ^ v[3];
}

static struct flow *lookUp(const struct service *s, const struct key *key, uint64_t hash)
{
    if (!s->buckets)
        return NULL;
    struct flow *flow = s->buckets[hash & s->mask];
    while (flow && (flow->hash != hash || memcmp(&flow->key, key, sizeof *key)))
        flow = flow->chain;
    return flow;
}

static int makeBuckets(struct service *s, size_t count)
{
    struct flow **buckets = calloc(count, sizeof *buckets);
    if (!buckets)
        return 0;
    for (size_t i = 0; s->buckets && i <= s->mask; i++)
        for (struct flow *flow = s->buckets[i], *next; flow; flow = next) {
            next = flow->chain;
            flow->chain = buckets[flow->hash & (count - 1)];
            buckets[flow->hash & (count - 1)] = flow;
        }
    free(s->buckets);
    s->buckets = buckets;
    s->mask = count - 1;
    return 1;
}

static void unlinkFlow(struct flow *flow)
{
    flow->newer->older = flow->older;
    flow->older->newer = flow->newer;
}

static void linkLast(struct flow *ring, struct flow *flow)
{
    flow->newer = ring;
    flow->older = ring->older;
    flow->older->newer = ring->older = flow;
}

static void forget(struct flow *flow)
{
    free(flow->kept);
    flow->kept = NULL;
    flow->keptSize = -1;
}

static void keep(struct flow *flow, const char *data, size_t size)
{
    char *copy = size > KEPT ? NULL : realloc(flow->kept, size ? size : 1);
    if (!copy) {                 /* then it is not sent a second time */
        forget(flow);
        return;
    }
    memcpy(copy, data, size);
    flow->kept = copy;
    flow->keptSize = (int) size;
}

static void touch(struct flow *flow, double now)
{
    struct flow *ring = flow->answered ? &flow->service->answered : &flow->service->unanswered;
    flow->used = now;
    if (ring->older != flow) {
        unlinkFlow(flow);
        linkLast(ring, flow);
    }
}

static void answer(struct flow *flow, double now)
{
    if (!flow->answered) {
        flow->answered = 1;
        flow->service->unansweredCount--;
        unlinkFlow(flow);
        linkLast(&flow->service->answered, flow);
    }
    touch(flow, now);
}

/* --- messages */

static int openInbox(struct inbox *in)
{
    in->buffers = malloc((size_t) SLOTS * STRIDE);
    if (!in->buffers)
        return 0;
    for (int i = 0; i < SLOTS; i++) {
        struct msghdr *m = &in->messages[i].msg_hdr;
        in->vectors[i].iov_base = in->buffers + (size_t) i * STRIDE;
        in->vectors[i].iov_len = LARGEST;
        m->msg_iov = &in->vectors[i];
        m->msg_iovlen = 1;
        m->msg_name = &in->names[i];
        m->msg_namelen = sizeof in->names[i];
        m->msg_control = in->control[i];
        m->msg_controllen = CONTROL;
    }
    return 1;
}

static void readyAgain(struct inbox *in, int from, int to)
{
    for (int i = from; i < to; i++) {
        in->messages[i].msg_hdr.msg_namelen = sizeof in->names[i];
        in->messages[i].msg_hdr.msg_controllen = CONTROL;
    }
}

/* The size of a train's datagrams; 0 for a single one. */
static unsigned segmentOf(struct msghdr *m, size_t size)
{
    for (struct cmsghdr *c = CMSG_FIRSTHDR(m); c; c = CMSG_NXTHDR(m, c))
        if (c->cmsg_level == SOL_UDP && c->cmsg_type == UDP_GRO) {
            int segment;
            memcpy(&segment, CMSG_DATA(c), sizeof segment);
            return segment > 0 && (size_t) segment < size ? (unsigned) segment : 0;
        }
    return 0;
}

static void readKey(struct msghdr *m, struct key *key)
{
    memset(key, 0, sizeof *key);
    if (((struct sockaddr *) m->msg_name)->sa_family == AF_INET6) {
        struct sockaddr_in6 *name = m->msg_name;
        key->six = 1;
        key->port = ntohs(name->sin6_port);
        key->scope = name->sin6_scope_id;
        memcpy(key->address, &name->sin6_addr, 16);
    } else {
        struct sockaddr_in *name = m->msg_name;
        key->port = ntohs(name->sin_port);
        memcpy(key->address, &name->sin_addr, 4);
    }
    for (struct cmsghdr *c = CMSG_FIRSTHDR(m); c; c = CMSG_NXTHDR(m, c)) {
        if (c->cmsg_level == IPPROTO_IP && c->cmsg_type == IP_PKTINFO) {
            /* The local address: never a broadcast one, as the destination of the header may be. */
            struct in_pktinfo *to = (struct in_pktinfo *) key->dialled;
            to->ipi_spec_dst = ((struct in_pktinfo *) CMSG_DATA(c))->ipi_spec_dst;
            key->dialledSize = sizeof *to;
        } else if (c->cmsg_level == IPPROTO_IPV6 && c->cmsg_type == IPV6_PKTINFO) {
            struct in6_pktinfo *to = (struct in6_pktinfo *) key->dialled;
            struct in6_pktinfo *at = (struct in6_pktinfo *) CMSG_DATA(c);
            if (IN6_IS_ADDR_MULTICAST(&at->ipi6_addr))
                continue;
            *to = *at;
            if (!IN6_IS_ADDR_LINKLOCAL(&at->ipi6_addr))
                to->ipi6_ifindex = 0;
            key->dialledSize = sizeof *to;
        }
    }
}

static struct msghdr *put(struct outbox *out, struct flow *flow, int from, char *data, size_t size, unsigned segment)
{
    int i = out->count++;
    struct msghdr *m = &out->messages[i].msg_hdr;
    out->vectors[i].iov_base = data;
    out->vectors[i].iov_len = size;
    out->flows[i] = flow;
    out->from[i] = from;
    out->segment[i] = segment;
    memset(m, 0, sizeof *m);
    m->msg_iov = &out->vectors[i];
    m->msg_iovlen = 1;
    m->msg_control = out->control[i];
    return m;
}

static void addControl(struct msghdr *m, int level, int type, const void *data, size_t size)
{
    struct cmsghdr *c = (struct cmsghdr *) ((char *) m->msg_control + m->msg_controllen);
    c->cmsg_level = level;
    c->cmsg_type = type;
    c->cmsg_len = CMSG_LEN(size);
    memcpy(CMSG_DATA(c), data, size);
    m->msg_controllen += CMSG_SPACE(size);
}

static void addSegment(struct msghdr *m, unsigned segment)
{
    uint16_t size = (uint16_t) segment;
    addControl(m, SOL_UDP, UDP_SEGMENT, &size, sizeof size);
}

static void putReply(struct outbox *out, struct flow *flow, char *data, size_t size, unsigned segment)
{
    struct msghdr *m = put(out, flow, 0, data, size, segment);
    const struct key *key = &flow->key;
    struct sockaddr_in6 *six = &out->names[out->count - 1];
    m->msg_name = six;
    memset(six, 0, sizeof *six);
    if (key->six) {
        six->sin6_family = AF_INET6;
        six->sin6_port = htons(key->port);
        six->sin6_scope_id = key->scope;
        memcpy(&six->sin6_addr, key->address, 16);
        m->msg_namelen = sizeof *six;
    } else {
        struct sockaddr_in *four = (struct sockaddr_in *) six;
        four->sin_family = AF_INET;
        four->sin_port = htons(key->port);
        memcpy(&four->sin_addr, key->address, 4);
        m->msg_namelen = sizeof *four;
    }
    if (key->dialledSize == sizeof (struct in6_pktinfo))
        addControl(m, IPPROTO_IPV6, IPV6_PKTINFO, key->dialled, key->dialledSize);
    else if (key->dialledSize == sizeof (struct in_pktinfo))
        addControl(m, IPPROTO_IP, IP_PKTINFO, key->dialled, key->dialledSize);
    if (segment)
        addSegment(m, segment);
}

static uint64_t countOf(size_t size, unsigned segment)
{
    return segment ? (size + segment - 1) / segment : 1;
}

/* The kernel cannot cut this train, or not for this path. */
static int mustBePlain(int number)
{
    return number == EINVAL || number == EMSGSIZE || number == EIO || number == EOPNOTSUPP;
}

/* Whether the datagram is dropped because of this machine; whatever else it is, Python decides. */
static int dropped(struct service *s, int number, uint64_t count)
{
    if (number == EMSGSIZE)
        s->dropped[TOO_LONG] += count;
    else if (number == EAGAIN || number == ENOBUFS || number == ENOMEM)
        s->dropped[BUSY] += count;
    else
        return 0;
    return 1;
}

/* --- from clients to endpoints */

static void later(engine *e, int index, int number)
{
    e->todo[e->todoCount].index = index;
    e->todo[e->todoCount++].number = number;
}

/* Send a flow's datagrams, from this one of the batch on; what cannot be sent without a decision is left for later. */
static void forward(engine *e, struct flow *flow, int index)
{
    struct outbox *out = &e->out;
    struct service *s = flow->service;
    touch(flow, e->now);
    while (index >= 0) {
        size_t at = e->batch[index].done;
        out->count = 0;
        while (index >= 0 && out->count < SLOTS) {
            struct datagram *d = &e->batch[index];
            size_t rest = d->size - at;
            if (d->segment && rest > d->segment && !flow->plain && e->offload & OFFLOAD_OUT) {
                addSegment(put(out, flow, index, d->data + at, rest, d->segment), d->segment);
            } else if (d->segment && rest > d->segment) {
                put(out, flow, index, d->data + at, d->segment, 0);
                at += d->segment;
                continue;
            } else {
                put(out, flow, index, d->data + at, rest, 0);
            }
            index = d->next;
            at = 0;
        }
        int sent = 0;
        while (sent < out->count) {
            int count = e->calls.send(flow->watched.fd, out->messages + sent, out->count - sent, 0);
            int number = count < 0 ? errno : 0;
            if (number == EINTR)
                continue;
            for (int i = sent; i < sent + count; i++) {
                size_t size = out->vectors[i].iov_len;
                e->batch[out->from[i]].done += size;
                flow->sent += size;
                s->sentBytes += size;
                s->sentCount += countOf(size, out->segment[i]);
            }
            if (count > 0) {
                int last = sent + count - 1;
                size_t size = out->vectors[last].iov_len;
                size_t tail = out->segment[last] ? (size - 1) % out->segment[last] + 1 : size;
                keep(flow, (char *) out->vectors[last].iov_base + size - tail, tail);
                sent += count;
                continue;
            }
            if (out->segment[sent] && mustBePlain(number)) {
                flow->plain = 1;
                index = out->from[sent];
                break;
            }
            if (dropped(s, number, countOf(out->vectors[sent].iov_len, out->segment[sent]))) {
                e->batch[out->from[sent]].done += out->vectors[sent].iov_len;
                sent++;
                continue;
            }
            for (int i = out->from[sent]; i >= 0; i = e->batch[i].next) {
                later(e, i, number);
                number = 0;
            }
            return;
        }
    }
}

static void serviceReadable(engine *e, struct service *s)
{
    struct flow *flows[SLOTS];
    int heads[SLOTS], known = 0, count = e->calls.receive(s->watched.fd, e->in.messages, SLOTS, 0);
    e->todoCount = e->todoNext = 0;
    if (count <= 0)
        return;                  /* nothing is known that would be an error here; it ends with this turn */
    e->budget -= count;
    e->batchOf = s;
    e->serial++;
    for (int i = 0; i < count; i++) {
        struct msghdr *m = &e->in.messages[i].msg_hdr;
        struct datagram *d = &e->batch[i];
        readKey(m, &d->key);
        d->hash = hashOf(e, &d->key);
        d->data = e->in.vectors[i].iov_base;
        d->size = e->in.messages[i].msg_len;
        d->segment = segmentOf(m, d->size);
        d->done = 0;
        d->next = -1;
        struct flow *flow = lookUp(s, &d->key, d->hash);
        if (!flow || flow->stale) {
            later(e, i, 0);
        } else if (flow->serial == e->serial) {
            e->batch[flow->last].next = i;
            flow->last = i;
        } else {
            flow->serial = e->serial;
            flow->last = heads[known] = i;
            flows[known++] = flow;
        }
    }
    for (int i = 0; i < known; i++)
        forward(e, flows[i], heads[i]);
    readyAgain(&e->in, 0, count);
}

/* The next one that was left for later. Gives whether Python is asked. */
static int settle(engine *e, struct ask *ask)
{
    struct todo it = e->todo[e->todoNext];
    struct datagram *d = &e->batch[it.index];
    struct flow *flow = lookUp(e->batchOf, &d->key, d->hash);
    if (flow && !flow->stale && !it.number) {
        int count = e->todoCount;
        d->next = -1;
        e->todoNext++;
        forward(e, flow, it.index);
        if (e->todoCount > count)  /* not all of it: the rest comes next, not last */
            e->todo[--e->todoNext] = e->todo[--e->todoCount];
        return 0;
    }
    size_t rest = d->size - d->done;
    ask->what = flow && it.number ? UNSENT : UNKNOWN;
    ask->service = e->batchOf;
    ask->flow = flow;
    ask->number = it.number;
    ask->key = &d->key;
    ask->data = d->data + d->done;
    ask->size = d->segment && rest > d->segment ? d->segment : rest;
    d->done += ask->size;
    e->todo[e->todoNext].number = 0;
    if (rest == ask->size)
        e->todoNext++;
    return 1;
}

/* --- from endpoints to clients */

/* A train to a client, one by one. */
static void replyPlainly(engine *e, struct service *s, struct flow *flow, char *data, size_t size, unsigned segment)
{
    struct outbox *out = &e->out;
    while (size) {
        int sent = 0;
        for (out->count = 0; size && out->count < SLOTS;) {
            size_t part = size < segment ? size : segment;
            putReply(out, flow, data, part, 0);
            data += part;
            size -= part;
        }
        while (sent < out->count) {
            int count = e->calls.send(s->watched.fd, out->messages + sent, out->count - sent, 0);
            if (count < 0) {
                int number = errno;
                if (number == EINTR)
                    continue;
                if (!dropped(s, number, 1))
                    s->dropped[ERROR]++;
                sent++;
            }
            for (; count > 0; count--, sent++) {
                flow->received += out->vectors[sent].iov_len;
                s->receivedBytes += out->vectors[sent].iov_len;
                s->receivedCount++;
            }
        }
    }
}

static void flushReplies(engine *e)
{
    struct outbox *out = &e->replies;
    struct service *s = e->repliesOf;
    int sent = 0;
    while (s && s->watched.fd >= 0 && sent < out->count) {
        struct flow *flow = out->flows[sent];
        size_t size = out->vectors[sent].iov_len;
        unsigned segment = out->segment[sent];
        int count = 0, number = 0;
        if (segment && (flow->plainBack || !(e->offload & OFFLOAD_OUT))) {
            replyPlainly(e, s, flow, out->vectors[sent].iov_base, size, segment);
            sent++;
            continue;
        }
        int until = sent + 1;
        while (until < out->count
               && !(out->segment[until] && (out->flows[until]->plainBack || !(e->offload & OFFLOAD_OUT))))
            until++;
        count = e->calls.send(s->watched.fd, out->messages + sent, until - sent, 0);
        if (count < 0) {
            number = errno;
            if (number == EINTR)
                continue;
            if (segment && mustBePlain(number)) {
                flow->plainBack = 1;
                continue;
            }
            if (!dropped(s, number, countOf(size, segment)))
                s->dropped[ERROR] += countOf(size, segment);
            sent++;
        }
        for (; count > 0; count--, sent++) {
            size = out->vectors[sent].iov_len;
            out->flows[sent]->received += size;
            s->receivedBytes += size;
            s->receivedCount += countOf(size, out->segment[sent]);
        }
    }
    readyAgain(&e->back, 0, out->count);
    out->count = 0;
    e->repliesOf = NULL;
}

/*
 * Each error is told twice: as the result of the next call, and in this queue. A queue that is not emptied keeps the
 * socket in its error condition. Gives the first error's number, 0 for none.
 */
static int drainErrors(engine *e, int fd)
{
    int number = 0;
    for (int i = 0; i < TURN; i++) {
        char control[256] __attribute__((aligned(8)));
        struct mmsghdr message = {.msg_hdr = {.msg_control = control, .msg_controllen = sizeof control}};
        if (e->calls.receive(fd, &message, 1, MSG_ERRQUEUE) <= 0)
            break;
        struct msghdr *m = &message.msg_hdr;
        for (struct cmsghdr *c = CMSG_FIRSTHDR(m); c && !number; c = CMSG_NXTHDR(m, c))
            if ((c->cmsg_level == IPPROTO_IP && c->cmsg_type == IP_RECVERR)
                || (c->cmsg_level == IPPROTO_IPV6 && c->cmsg_type == IPV6_RECVERR)) {
                struct sock_extended_err it;
                memcpy(&it, CMSG_DATA(c), sizeof it);
                number = (int) it.ee_errno;
            }
    }
    return number;
}

/* Gives the number of an error that the network has reported; 0 for none. */
static int flowReadable(engine *e, struct flow *flow, uint32_t events)
{
    struct outbox *out = &e->replies;
    int trouble = 0;
    if (flow->service->watched.fd < 0) {
        /* It has stopped listening, and the flow is about to end. */
        readyAgain(&e->in, 0, e->calls.receive(flow->watched.fd, e->in.messages, SLOTS, 0));
        drainErrors(e, flow->watched.fd);
        return 0;
    }
    for (int round = 0; round < TURN; round++) {
        if (out->count == SLOTS || e->repliesOf != flow->service)
            flushReplies(e);
        e->repliesOf = flow->service;
        int first = out->count, room = SLOTS - first;
        int count = e->calls.receive(flow->watched.fd, e->back.messages + first, room, 0);
        if (count < 0) {
            if (errno == EINTR)
                continue;
            if (errno == EAGAIN)
                break;
            /* Whatever the endpoint had sent before still counts: read on, report afterwards. */
            if (!trouble)
                trouble = errno;
            drainErrors(e, flow->watched.fd);
            continue;
        }
        for (int i = first; i < first + count; i++) {
            size_t size = e->back.messages[i].msg_len;
            putReply(out, flow, e->back.vectors[i].iov_base, size, segmentOf(&e->back.messages[i].msg_hdr, size));
        }
        answer(flow, e->now);
        forget(flow);
        e->budget -= count;
        if (count < room || out->count == SLOTS)
            break;
    }
    if (events & EPOLLERR && !trouble)
        trouble = drainErrors(e, flow->watched.fd);
    return trouble;
}

/* --- what is called from Python */

engine *udp_new(int offload)
{
    engine *e = calloc(1, sizeof *e);
    if (!e)
        return NULL;
    e->offload = offload;
    e->calls.receive = kernelReceive;
    e->calls.send = kernelSend;
    e->epoll = epoll_create1(EPOLL_CLOEXEC);
    if (e->epoll < 0 || !openInbox(&e->in) || !openInbox(&e->back)
        || getrandom(e->secret, sizeof e->secret, GRND_NONBLOCK) != sizeof e->secret) {
        if (e->epoll >= 0)
            close(e->epoll);
        free(e->in.buffers);
        free(e->back.buffers);
        free(e);
        return NULL;
    }
    return e;
}

int udp_fd(engine *e)
{
    return e->epoll;
}

struct calls *udp_calls(engine *e)
{
    return &e->calls;
}

void udp_flow(struct flow *flow)
{
    flow->watched.fd = flow->keptSize = -1;
}

void udp_service(struct service *s)
{
    s->watched.fd = -1;
    s->watched.isService = 1;
    s->unanswered.newer = s->unanswered.older = &s->unanswered;
    s->answered.newer = s->answered.older = &s->answered;
}

static int watch(engine *e, struct watched *it, int fd)
{
    if ((size_t) fd >= e->fdRoom) {
        size_t room = 2 * (size_t) fd + 64;
        struct watched **more = realloc(e->byFd, room * sizeof *more);
        if (!more)
            return -ENOMEM;
        memset(more + e->fdRoom, 0, (room - e->fdRoom) * sizeof *more);
        e->byFd = more;
        e->fdRoom = room;
    }
    struct epoll_event event = {.events = EPOLLIN, .data = {.fd = fd}};
    if (epoll_ctl(e->epoll, EPOLL_CTL_ADD, fd, &event) < 0)
        return -errno;
    it->fd = fd;
    e->byFd[fd] = it;
    return 0;
}

/*
 * An event is told by its descriptor, and found here or not: after a close it may still come, while another process has
 * a copy of the descriptor for a moment.
 */
static void unwatch(engine *e, struct watched *it)
{
    if (it->fd >= 0 && e->byFd[it->fd] == it)
        e->byFd[it->fd] = NULL;
    it->fd = -1;
}

/* From now on its clients are served by that socket, which stays Python's. Gives 0 or a negative error number. */
int udp_listen(engine *e, struct service *s, int fd)
{
    return watch(e, &s->watched, fd);
}

/* To be called before its socket is closed. */
void udp_deafen(engine *e, struct service *s)
{
    if (e->repliesOf == s) {
        e->replies.count = 0;
        e->repliesOf = NULL;
    }
    if (e->batchOf == s) {
        e->todoCount = e->todoNext = 0;
        e->batchOf = NULL;
    }
    unwatch(e, &s->watched);
}

struct flow *udp_find(engine *e, struct service *s, const struct key *key)
{
    return lookUp(s, key, hashOf(e, key));
}

/* From now on that flow, whose key is set, is known. Gives 0 or a negative error number. */
int udp_add(engine *e, struct service *s, struct flow *flow, int fd)
{
    if ((!s->buckets || s->count > s->mask) && !makeBuckets(s, s->buckets ? 2 * (s->mask + 1) : 8) && !s->buckets)
        return -ENOMEM;
    int failed = fd < 0 ? 0 : watch(e, &flow->watched, fd);
    if (failed)
        return failed;
    flow->hash = hashOf(e, &flow->key);
    flow->service = s;
    flow->chain = s->buckets[flow->hash & s->mask];
    s->buckets[flow->hash & s->mask] = flow;
    linkLast(&s->unanswered, flow);
    s->count++;
    s->unansweredCount++;
    return 0;
}

/* It is known no more; to be called before its socket is closed. */
void udp_remove(engine *e, struct flow *flow)
{
    struct service *s = flow->service;
    struct flow **where = &s->buckets[flow->hash & s->mask];
    while (*where != flow)
        where = &(*where)->chain;
    *where = flow->chain;
    unlinkFlow(flow);
    s->count--;
    if (!flow->answered)
        s->unansweredCount--;
    unwatch(e, &flow->watched);
    forget(flow);
    flow->service = NULL;
}

void udp_touch(struct flow *flow, double now)
{
    touch(flow, now);
}

void udp_answer(struct flow *flow, double now)
{
    answer(flow, now);
}

void udp_keep(struct flow *flow, const char *data, int size)
{
    if (size < 0)
        forget(flow);
    else
        keep(flow, data, size);
}

void udp_emptied(struct service *s)
{
    free(s->buckets);
    s->buckets = NULL;
}

/*
 * Relay what there is. Gives 1 where Python is to decide first, and to call again; 0 when all is done, or enough for one
 * turn: then the descriptor of udp_fd() is readable again.
 */
int udp_run(engine *e, double now, struct ask *ask)
{
    e->now = now;
    if (!e->running) {
        e->running = 1;
        e->budget = SHARE;
    }
    for (;;) {
        if (e->todoNext < e->todoCount) {
            if (settle(e, ask)) {
                flushReplies(e);
                return 1;
            }
        } else if (e->eventNext < e->eventCount) {
            struct epoll_event *event = &e->events[e->eventNext++];
            e->budget--;
            int fd = event->data.fd;
            struct watched *it = (size_t) fd < e->fdRoom ? e->byFd[fd] : NULL;
            if (it && it->isService) {
                serviceReadable(e, (struct service *) it);
            } else if (it) {
                struct flow *flow = (struct flow *) it;
                int number = flowReadable(e, flow, event->events);
                if (number) {
                    flushReplies(e);
                    ask->what = REPORTED;
                    ask->service = flow->service;
                    ask->flow = flow;
                    ask->number = number;
                    return 1;
                }
            }
        } else {
            flushReplies(e);
            e->eventNext = e->eventCount = 0;
            int count = e->budget > 0 ? epoll_wait(e->epoll, e->events, EVENTS, 0) : 0;
            if (count <= 0) {
                e->running = 0;
                return 0;
            }
            e->eventCount = count;
        }
    }
}

void udp_free(engine *e)
{
    close(e->epoll);
    free(e->byFd);
    free(e->in.buffers);
    free(e->back.buffers);
    free(e);
}
