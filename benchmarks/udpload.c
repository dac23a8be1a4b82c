/*
 * Both ends of the UDP measurement.
 *
 *   udpload echo ADDRESS PORT
 *       sends back whatever comes, until it is killed.
 *   udpload load ADDRESS PORT SECONDS SOCKETS OUTSTANDING SIZE TRAIN
 *       keeps so many datagrams (or trains of that many, which it also takes whole) under way on each socket; prints
 *       datagrams answered, the seconds it took, and how often a socket was silent for 50 ms: then what was under way
 *       is taken for lost.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define SLOTS 64
#define LARGEST 65535
#define CONTROL 64
#define SOCKETS 1024
#define PATIENCE 0.05
#ifndef SOL_UDP
#define SOL_UDP 17
#endif
#ifndef UDP_SEGMENT
#define UDP_SEGMENT 103
#endif
#ifndef UDP_GRO
#define UDP_GRO 104
#endif

static struct mmsghdr in[SLOTS], out[SLOTS];
static struct iovec vectors[SLOTS];
static struct sockaddr_storage names[SLOTS];
static char control[SLOTS][CONTROL] __attribute__((aligned(8)));

static double now(void)
{
    struct timespec it;
    clock_gettime(CLOCK_MONOTONIC, &it);
    return it.tv_sec + it.tv_nsec / 1e9;
}

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static socklen_t parse(const char *host, const char *port, struct sockaddr_storage *into)
{
    struct sockaddr_in *four = (struct sockaddr_in *) into;
    struct sockaddr_in6 *six = (struct sockaddr_in6 *) into;
    memset(into, 0, sizeof *into);
    if (inet_pton(AF_INET, host, &four->sin_addr) == 1) {
        four->sin_family = AF_INET;
        four->sin_port = htons(atoi(port));
        return sizeof *four;
    }
    if (inet_pton(AF_INET6, host, &six->sin6_addr) != 1) {
        fprintf(stderr, "%s is no address\n", host);
        exit(1);
    }
    six->sin6_family = AF_INET6;
    six->sin6_port = htons(atoi(port));
    return sizeof *six;
}

static int openSocket(int family, int trains)
{
    int fd = socket(family, SOCK_DGRAM | SOCK_NONBLOCK, 0), size = 4 << 20, on = 1;
    if (fd < 0)
        fail("socket");
    if (setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof size) < 0)
        setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &size, sizeof size);
    if (setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &size, sizeof size) < 0)
        setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
    if (trains)
        setsockopt(fd, SOL_UDP, UDP_GRO, &on, sizeof on);
    return fd;
}

static void openSlots(void)
{
    char *buffers = malloc((size_t) SLOTS * (LARGEST + 257));
    if (!buffers)
        fail("malloc");
    for (int i = 0; i < SLOTS; i++)
        vectors[i].iov_base = buffers + (size_t) i * (LARGEST + 257);
}

static int receive(int fd, int named)
{
    for (int i = 0; i < SLOTS; i++) {
        struct msghdr *m = &in[i].msg_hdr;
        memset(m, 0, sizeof *m);
        vectors[i].iov_len = LARGEST;
        m->msg_iov = &vectors[i];
        m->msg_iovlen = 1;
        m->msg_control = control[i];
        m->msg_controllen = CONTROL;
        if (named) {
            m->msg_name = &names[i];
            m->msg_namelen = sizeof names[i];
        }
    }
    return recvmmsg(fd, in, SLOTS, MSG_DONTWAIT, NULL);
}

static int segmentOf(struct msghdr *m)
{
    for (struct cmsghdr *c = CMSG_FIRSTHDR(m); c; c = CMSG_NXTHDR(m, c))
        if (c->cmsg_level == SOL_UDP && c->cmsg_type == UDP_GRO) {
            int size;
            memcpy(&size, CMSG_DATA(c), sizeof size);
            return size;
        }
    return 0;
}

static void setSegment(struct msghdr *m, char *where, int segment)
{
    uint16_t size = segment;
    struct cmsghdr *c = (struct cmsghdr *) where;
    m->msg_control = where;
    m->msg_controllen = CMSG_SPACE(sizeof size);
    c->cmsg_level = SOL_UDP;
    c->cmsg_type = UDP_SEGMENT;
    c->cmsg_len = CMSG_LEN(sizeof size);
    memcpy(CMSG_DATA(c), &size, sizeof size);
}

static int echo(const char *host, const char *port)
{
    struct sockaddr_storage address;
    socklen_t length = parse(host, port, &address);
    int fd = openSocket(address.ss_family, 1);
    if (bind(fd, (struct sockaddr *) &address, length) < 0)
        fail("bind");
    openSlots();
    puts("ready");
    fflush(stdout);
    for (;;) {
        int count = receive(fd, 1);
        if (count < 0) {
            struct pollfd it = {fd, POLLIN, 0};
            poll(&it, 1, -1);
            continue;
        }
        for (int i = 0; i < count; i++) {
            int segment = segmentOf(&in[i].msg_hdr);
            vectors[i].iov_len = in[i].msg_len;
            out[i].msg_hdr = in[i].msg_hdr;
            out[i].msg_hdr.msg_control = NULL;
            out[i].msg_hdr.msg_controllen = 0;
            if (segment && segment < (int) in[i].msg_len)
                setSegment(&out[i].msg_hdr, control[i], segment);
        }
        for (int sent = 0; sent < count;) {
            int more = sendmmsg(fd, out + sent, count - sent, 0);
            sent += more > 0 ? more : 1;
        }
    }
}

static int load(char **argv)
{
    static int fds[SOCKETS];
    static long under[SOCKETS];  /* datagrams under way */
    static double heard[SOCKETS];
    static char data[LARGEST], trainControl[CONTROL] __attribute__((aligned(8)));
    struct sockaddr_storage address;
    socklen_t length = parse(argv[0], argv[1], &address);
    double seconds = atof(argv[2]);
    int sockets = atoi(argv[3]), outstanding = atoi(argv[4]), size = atoi(argv[5]), train = atoi(argv[6]);
    long answered = 0, silences = 0;
    int epoll = epoll_create1(0);
    struct iovec vector = {data, (size_t) size * train};
    if (sockets < 1 || sockets > SOCKETS || size < 1 || train < 1 || size * train > 65507) {
        fprintf(stderr, "too many, or too large\n");
        return 1;
    }
    openSlots();
    for (int i = 0; i < sockets; i++) {
        struct epoll_event event = {.events = EPOLLIN, .data = {.u32 = i}};
        fds[i] = openSocket(address.ss_family, train > 1);
        if (connect(fds[i], (struct sockaddr *) &address, length) < 0)
            fail("connect");
        epoll_ctl(epoll, EPOLL_CTL_ADD, fds[i], &event);
    }
    double began = now(), at = began;
    while (at - began < seconds) {
        struct epoll_event events[SOCKETS];
        for (int i = 0; i < sockets; i++) {
            if (under[i] && at - heard[i] > PATIENCE) {
                silences++;
                under[i] = 0;
            }
            while (outstanding * train - under[i] >= train) {
                int count = 0;
                for (long room = (outstanding * train - under[i]) / train; count < room && count < SLOTS; count++) {
                    struct msghdr *m = &out[count].msg_hdr;
                    memset(m, 0, sizeof *m);
                    m->msg_iov = &vector;
                    m->msg_iovlen = 1;
                    if (train > 1)
                        setSegment(m, trainControl, size);
                }
                int sent = sendmmsg(fds[i], out, count, 0);
                heard[i] = at;
                if (sent <= 0) {
                    if (errno != EAGAIN && errno != ECONNREFUSED)
                        fail("sendmmsg");
                    break;
                }
                under[i] += (long) sent * train;
            }
        }
        int ready = epoll_wait(epoll, events, SOCKETS, 10);
        at = now();
        for (int i = 0; i < ready; i++) {
            int which = events[i].data.u32, count = receive(fds[which], 0);
            for (int k = 0; k < count; k++) {
                int segment = segmentOf(&in[k].msg_hdr);
                long parts = segment ? (in[k].msg_len + segment - 1) / segment : 1;
                answered += parts;
                under[which] = under[which] > parts ? under[which] - parts : 0;
            }
            heard[which] = at;
        }
    }
    printf("%ld %.6f %ld\n", answered, at - began, silences);
    return 0;
}

int main(int argc, char **argv)
{
    if (argc == 4 && !strcmp(argv[1], "echo"))
        return echo(argv[2], argv[3]);
    if (argc == 9 && !strcmp(argv[1], "load"))
        return load(argv + 2);
    fprintf(stderr, "usage: see the beginning of udpload.c\n");
    return 1;
}
