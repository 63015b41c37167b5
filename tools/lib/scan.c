// The chain of lengths of a log: a plain concatenation of Cap'n Proto messages. See scan() in logreader.py, which says what the columns are.
#include <stdint.h>
#include <string.h>

#define AHEAD 96  // words that are asked for before they are needed: a third less time where the log has left the cache

// words: the log's 64-bit words, little endian. start, root: (count / 2 + 1), word offsets. Returns the number of messages; *end is the word behind the last
// whole one.
int64_t scan(const uint64_t *words, int64_t count, int64_t max_segments, int64_t *start, int64_t *root, int64_t *end) {
  int64_t n = 0, pos = 0;
  while (pos < count) {
    uint64_t header = words[pos];
    int64_t more = (int64_t)(header & 0xFFFFFFFFu), body = pos + 1, length = (int64_t)(header >> 32);
    if (header == 0) break;
    if (more) {  // several memory segments: a table of their lengths
      body = pos + (more + 3) / 2;
      if (more >= max_segments || body > count) break;
      for (int64_t k = 1; k <= more; k++) {
        uint32_t l;
        memcpy(&l, (const char *)(words + pos) + 4 + 4 * k, 4);
        length += l;
      }
      if (!length) break;
    }
    if (body + length > count) break;  // cut short
    for (int64_t k = pos; k < body + length; k += 8) __builtin_prefetch(words + k + AHEAD);  // where the next begins is known only here
    start[n] = pos;
    root[n++] = body;
    pos = body + length;
  }
  *end = pos;
  return n;
}

// Of n messages their times, and their union tags: 0xFFFF where the root lies behind a far pointer, 0xFFFD where there is no root, or none inside the
// message; their time is 0. root, end: of scan(), ends in words.
void headers(const uint64_t *words, int64_t count, int64_t n, const int64_t *root, const int64_t *end, uint64_t *time, uint16_t *tag) {
  for (int64_t i = 0; i < n; i++) {
    uint64_t pointer = words[root[i]];  // a struct's: two low bits 0, 30 bits offset in words, then 16 bits of data words
    int64_t data = root[i] + 1 + (int64_t)(pointer >> 2 & 0x3FFFFFFF);
    if ((pointer & 3) == 0 && (pointer >> 32 & 0xFFFF) >= 2 && data + 2 <= end[i] && end[i] <= count) {
      time[i] = words[data];
      tag[i] = (uint16_t)words[data + 1];
    } else {
      time[i] = 0;
      tag[i] = (pointer & 3) == 2 ? 0xFFFF : 0xFFFD;
    }
  }
}
