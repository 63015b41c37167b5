// The chain of lengths of a log: a plain concatenation of Cap'n Proto messages. See scan() in logreader.py, which says what the columns are.
#include <stdint.h>
#include <string.h>

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
    start[n] = pos;
    root[n++] = body;
    pos = body + length;
  }
  *end = pos;
  return n;
}
