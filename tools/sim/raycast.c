// Ray-casts one frame of the simulated road: a flat ground with a curved, painted road, and oriented boxes on it.
// Frame: openpilot's calibrated frame, x forward, y right, z down, meters, the camera at the origin. Depth is z along the optical axis.
// Deterministic: every texture is an integer hash, and no result depends on threads or time.
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { BACKGROUND, ROAD, LANE, VEHICLE, PEDESTRIAN };
enum { LINE_SOLID = 1, LINE_DASHED = 2, LINE_DOUBLE = 3 };
enum { PAINT_PLAIN, PAINT_BODY, PAINT_CABIN, PAINT_WHEEL, PAINT_FOLIAGE, PAINT_BUILDING };

typedef struct {
  double height;                   // of the camera above the ground
  double s0;                       // arc length of the road below the camera
  int32_t n_table;                 // centerline table: lateral y, arc length and heading at x = i * table_step
  float table_step;
  const float *table_y, *table_s, *table_heading;
  int32_t n_lines;
  const float *lines;              // per line: lateral d, kind, width, r, g, b, wear, dash length, dash period, phase
  float d_left, d_right;           // road edges, lateral from the centerline
  float shoulder, walk;            // width beyond the edge: paved shoulder, then pavement
  float asphalt[3], terrain[3], sky_top[3], sky_low[3], sun[3], sun_dir[3], ambient[3], walk_rgb[3];
  float headlight, street_light;   // strength, 0 by day
  float haze;                      // 1/m
  float texture;                   // contrast of the ground texture
  float wet;
  float mirror;                    // how much of what it reflects a wet road shows, 0 where it does not
  float rain;                      // streaks and drops on the picture, 0..1
  uint32_t seed;
  int32_t n_boxes;
  const float *boxes;              // per box: x, y, yaw, half length, half width, z low, z high (up), r, g, b, class, instance, paint, emission
} Scene;

#define LINE_FLOATS 10
#define BOX_FLOATS 14

static inline uint32_t hash3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t h = a * 0x9E3779B1u ^ b * 0x85EBCA77u ^ c * 0xC2B2AE3Du;
  h ^= h >> 15; h *= 0x2C1B3C6Du; h ^= h >> 12; h *= 0x297A2D39u; h ^= h >> 15;
  return h;
}

static inline int32_t ifloor(float x) { int32_t i = (int32_t)x; return i - (x < (float)i); }  // floorf is a call without SSE4.1

static inline float wrap(float x, float period) { return x - period * (float)ifloor(x / period); }  // 0..period

static inline float noise(float x, float y, uint32_t seed) {  // 0..1, smooth value noise of unit cell
  int32_t ix = ifloor(x), iy = ifloor(y);
  float u = x - (float)ix, v = y - (float)iy;
  u = u * u * (3 - 2 * u); v = v * v * (3 - 2 * v);
  const float k = 1.0f / 4294967295.0f;
  float a = hash3(ix, iy, seed) * k, b = hash3(ix + 1, iy, seed) * k, c = hash3(ix, iy + 1, seed) * k, d = hash3(ix + 1, iy + 1, seed) * k;
  return a + (b - a) * u + (c - a) * v + (a - b - c + d) * u * v;
}

// light at a point from our headlights and the street lamps, which only count in the dark
static inline float lamps(const Scene *w, float x, float y, float s) {
  float l = 0;
  if (w->headlight > 0 && x > 0.5f) {
    float spread = y / (2.2f + 0.16f * x), reach = (x - 9) / 26;
    l += w->headlight * expf(-spread * spread) * (x < 9 ? 0.35f + 0.65f * x / 9 : expf(-reach * reach) + 0.12f * expf(-x / 60));
  }
  if (w->street_light > 0) {
    float p = (wrap(s, 35.0f) - 17.5f) / 9; l += w->street_light * expf(-p * p);
  }
  return l;
}

static inline void shade(const Scene *w, const float *base, float sun_amount, float lamp, float t, float emission, float *out) {
  float f = w->haze > 0 ? expf(-t * w->haze) : 1;
  for (int i = 0; i < 3; i++) {
    float c = base[i] * (w->ambient[i] + w->sun[i] * sun_amount + lamp) + base[i] * emission;
    out[i] = c * f + w->sky_low[i] * (1 - f);
  }
}

// rgb may be NULL: the class alone is a third of the work
static void ground(const Scene *w, float X, float Y, float t, float *rgb, uint8_t *sem) {
  float base[3], fi = X / w->table_step;
  int far = fi >= w->n_table - 2 || X < 0;
  int i = far ? (X < 0 ? 0 : w->n_table - 2) : (int)fi;
  float u = far ? 0 : fi - i;
  float yc = w->table_y[i] + u * (w->table_y[i + 1] - w->table_y[i]), heading = w->table_heading[i] + u * (w->table_heading[i + 1] - w->table_heading[i]);
  float d = (Y - yc) * cosf(heading), s = w->table_s[i] + u * (w->table_s[i + 1] - w->table_s[i]) + (float)w->s0 + (Y - yc) * sinf(heading);
  if (X < 0) s = (float)w->s0 + X;
  float fade = 1.0f / (1.0f + t * 0.03f);
  *sem = BACKGROUND;
  if (!far && d > w->d_left && d < w->d_right) {
    *sem = ROAD;
    float n = rgb == NULL ? 0 : noise(s * 7, d * 7, w->seed) * fade + noise(s * 0.35f, d * 0.9f, w->seed + 1) + 0.6f * noise(s * 0.05f, d * 3, w->seed + 2) - 1.3f * 0.5f - 0.5f * fade;
    for (int k = 0; k < 3; k++) base[k] = w->asphalt[k] * (1 + w->texture * n);
    for (int l = 0; l < w->n_lines; l++) {
      const float *p = w->lines + l * LINE_FLOATS;
      float off = d - p[0], half = p[2] * 0.5f;
      int kind = (int)p[1], hit = 0;
      if (kind == LINE_DOUBLE) hit = fabsf(fabsf(off) - p[2]) < half;
      else hit = fabsf(off) < half;
      if (hit && kind == LINE_DASHED) hit = wrap(s + p[9], p[8]) < p[7];
      if (!hit) continue;
      float worn = noise(s * 1.1f, d * 9 + l * 17, w->seed + 5) * 0.6f + noise(s * 9, d * 30, w->seed + 6) * 0.4f < p[6] ? 0.25f : 1.0f;
      if (worn == 1.0f) *sem = LANE;
      if (rgb != NULL) for (int k = 0; k < 3; k++) base[k] = base[k] * (1 - worn) + p[3 + k] * worn * (0.9f + 0.2f * noise(s * 5, d * 20, w->seed + 7));
    }
  } else if (rgb != NULL) {
    float out = far ? 1e3f : (d < 0 ? w->d_left - d : d - w->d_right);
    if (out < w->shoulder) {
      float n = noise(s * 5, d * 5, w->seed + 3) - 0.5f;
      for (int k = 0; k < 3; k++) base[k] = (w->asphalt[k] * 0.6f + w->terrain[k] * 0.4f) * (1 + w->texture * n);
    } else if (out < w->shoulder + w->walk) {
      float joint = wrap(s, 1.5f) < 0.05f + 0.002f * t ? 0.75f : 1, kerb = out - w->shoulder < 0.18f ? 1.25f : 1;
      for (int k = 0; k < 3; k++) base[k] = w->walk_rgb[k] * joint * kerb * (0.9f + 0.2f * noise(s * 3, d * 3, w->seed + 4));
    } else {
      float n = 0.6f * noise(s * 1.7f, d * 1.7f, w->seed + 8) * fade + 0.8f * noise(s * 0.13f, d * 0.13f, w->seed + 9) - 0.4f - 0.3f * fade;
      for (int k = 0; k < 3; k++) base[k] = w->terrain[k] * (1 + 0.9f * n);
    }
  }
  if (rgb == NULL) return;
  float up = -w->sun_dir[2] > 0 ? -w->sun_dir[2] : 0;
  shade(w, base, up, lamps(w, X, Y, s), t, 0, rgb);
  if (w->wet > 0 && *sem != BACKGROUND) for (int k = 0; k < 3; k++) rgb[k] += w->wet * 0.25f * w->sky_low[k] * fminf(1, t / 60);
}

static void sky(const Scene *w, const float *dir, float *rgb) {
  float len = sqrtf(dir[0] * dir[0] + dir[1] * dir[1] + dir[2] * dir[2]), e = -dir[2] / len, az = atan2f(dir[1], dir[0]);
  float hill = e >= 0.056f ? 0 : 0.035f * noise(az * 6 + 40, 0.5f, w->seed + 20) + 0.02f * noise(az * 23 + 90, 0.5f, w->seed + 21);
  float k = fminf(1, fmaxf(0, e * 2.2f)), cloud = noise(az * 4 + 60, e * 18, w->seed + 22) * 0.6f + noise(az * 11 + 60, e * 45, w->seed + 23) * 0.4f;
  for (int i = 0; i < 3; i++) {
    float c = w->sky_low[i] + (w->sky_top[i] - w->sky_low[i]) * k;
    if (cloud > 0.55f) c += (cloud - 0.55f) * 0.9f * w->sky_low[i];
    if (e < hill) c = 0.55f * c + 0.3f * w->terrain[i] * (w->ambient[i] + 0.4f * w->sun[i]);
    rgb[i] = c;
  }
}

static void paint(const float *b, const float *q, int face, float *base, float *emission, uint32_t seed) {
  // q: hit in the box's frame (x along its length, y right, z up); face: 0 rear, 1 front, 2 sides, 3 top or bottom
  int kind = (int)b[12];
  float z0 = b[5], z1 = b[6], up = (q[2] - z0) / fmaxf(1e-3f, z1 - z0), side = fabsf(q[1]) / b[4];
  for (int i = 0; i < 3; i++) base[i] = b[7 + i];
  *emission = 0;
  if (kind == PAINT_BODY) {
    if (up < 0.22f) for (int i = 0; i < 3; i++) base[i] *= 0.35f;
    if (face <= 1 && side > 0.62f && up > 0.5f && up < 0.85f) {
      if (face == 0) { base[0] = 0.75f; base[1] = 0.05f; base[2] = 0.05f; } else { base[0] = base[1] = 0.9f; base[2] = 0.85f; }
      *emission = b[13];
    } else if (face <= 1 && side < 0.3f && up > 0.3f && up < 0.48f) { base[0] = base[1] = base[2] = 0.75f; }
  } else if (kind == PAINT_CABIN) {
    if (up > 0.12f && up < 0.85f && side < 0.9f + (face == 2) && face != 3) { base[0] = 0.07f; base[1] = 0.09f; base[2] = 0.11f; }
  } else if (kind == PAINT_FOLIAGE) {
    float n = noise(q[0] * 3 + q[1] * 2, q[2] * 3, seed + 30);
    for (int i = 0; i < 3; i++) base[i] *= 0.5f + n;
  } else if (kind == PAINT_BUILDING && face != 3) {
    float along = face == 2 ? q[0] : q[1], wx = wrap(along / 2.6f, 1), wz = wrap(q[2] / 3.0f, 1);
    if (wx > 0.25f && wx < 0.7f && wz > 0.35f && wz < 0.8f) {
      int lit = hash3(ifloor(along / 2.6f), ifloor(q[2] / 3.0f), seed + (uint32_t)b[0]) % 3 == 0;
      for (int i = 0; i < 3; i++) base[i] = base[i] * 0.3f + 0.02f;
      if (lit && b[13] > 0) { base[0] = 0.9f; base[1] = 0.75f; base[2] = 0.45f; *emission = b[13]; }
    }
  }
}

// A ray o + t d against a box, all in the box's frame (z up): 1 where it is entered at t > *t, which then says where, through which axis' side.
static inline int slabs(const float *b, const float *o, const float *d, float z0, float z1, float *t, int *axis, int *sign) {
  float lo[3] = {-b[3], -b[4], z0}, hi[3] = {b[3], b[4], z1}, tn = *t, tf = 1e9f;
  *axis = -1;
  for (int i = 0; i < 3; i++) {
    if (fabsf(d[i]) < 1e-9f) { if (o[i] < lo[i] || o[i] > hi[i]) return 0; continue; }
    float ta = (lo[i] - o[i]) / d[i], tb = (hi[i] - o[i]) / d[i]; int sg = -1;
    if (ta > tb) { float q = ta; ta = tb; tb = q; sg = 1; }
    if (ta > tn) { tn = ta; *axis = i; *sign = sg; }
    if (tb < tf) tf = tb;
    if (tn > tf) return 0;
  }
  *t = tn;
  return *axis >= 0;
}

// The color of a box where slabs() hit it. X, Y: the place; distance: from the camera, for haze.
static void shade_box(const Scene *w, const float *b, const float *o, const float *d, float t, int axis, int sign, float X, float Y, float distance, float *rgb) {
  float q[3], base[3], emission, c = cosf(b[2]), s = sinf(b[2]);
  for (int i = 0; i < 3; i++) q[i] = o[i] + t * d[i];
  int face = axis == 0 ? (sign < 0 ? 0 : 1) : axis == 1 ? 2 : 3;
  paint(b, q, face, base, &emission, w->seed);
  float nx = axis == 0 ? sign : 0, ny = axis == 1 ? sign : 0, nz = axis == 2 ? -(float)sign : 0;  // back to z down
  float wx = c * nx - s * ny, wy = s * nx + c * ny, lit = wx * w->sun_dir[0] + wy * w->sun_dir[1] + nz * w->sun_dir[2];
  float facing = fmaxf(0.15f, fabsf(axis == 2 ? 0.2f : (float)(nx * d[0] + ny * d[1])));
  shade(w, base, lit > 0 ? lit : 0.05f, lamps(w, X, Y, (float)w->s0 + X) * facing, distance, emission, rgb);
}

typedef struct { const double *R, *K; int width, height; double *across, *down; } Camera;  // a ray's parts by column and by row

static inline void ray(const Camera *m, int u, int v, float *dir) {
  for (int i = 0; i < 3; i++) dir[i] = (float)(m->across[3 * u + i] + m->down[3 * v + i] + m->R[i * 3 + 2]);
}

// The pixels u0, v0 .. u1, v1 that a box of this half length and width may cover, z up from the ground. 0: none.
static int rectangle(const Camera *m, const float *b, float h, float hl, float hw, float z0, float z1, int *r) {
  const double *R = m->R, *K = m->K;
  float c = cosf(b[2]), s = sinf(b[2]);
  int u0 = m->width, u1 = -1, v0 = m->height, v1 = -1, behind = 0;
  for (int k = 0; k < 8; k++) {
    float lx = k & 1 ? hl : -hl, ly = k & 2 ? hw : -hw, lz = k & 4 ? z1 : z0;
    float X[3] = {b[0] + c * lx - s * ly, b[1] + s * lx + c * ly, h - lz};
    double z = R[2] * X[0] + R[5] * X[1] + R[8] * X[2];
    if (z < 0.3) { behind++; continue; }
    double x = (R[0] * X[0] + R[3] * X[1] + R[6] * X[2]) / z * K[0] + K[2], y = (R[1] * X[0] + R[4] * X[1] + R[7] * X[2]) / z * K[1] + K[3];
    x = fmax(-1e6, fmin(1e6, x)); y = fmax(-1e6, fmin(1e6, y));
    if (floor(x) < u0) u0 = (int)floor(x);
    if (ceil(x) > u1) u1 = (int)ceil(x);
    if (floor(y) < v0) v0 = (int)floor(y);
    if (ceil(y) > v1) v1 = (int)ceil(y);
  }
  if (behind == 8) return 0;
  if (behind) { u0 = 0; v0 = 0; u1 = m->width - 1; v1 = m->height - 1; }
  r[0] = u0 < 0 ? 0 : u0; r[1] = v0 < 0 ? 0 : v0;
  r[2] = u1 >= m->width ? m->width - 1 : u1; r[3] = v1 >= m->height ? m->height - 1 : v1;
  return 1;
}

static void shadow(const Scene *w, const Camera *m, const float *b, float *rgb, const float *depth, const uint16_t *instance) {
  float c = cosf(b[2]), s = sinf(b[2]), grow = 0.25f, h = (float)w->height, hl = b[3] + grow, hw = b[4] + grow;
  int r[4];
  if (!rectangle(m, b, h, hl, hw, 0, 0, r)) return;
  for (int v = r[1]; v <= r[3]; v++) for (int u = r[0]; u <= r[2]; u++) {
    float dir[3]; int p = v * m->width + u;
    ray(m, u, v, dir);
    if (dir[2] <= 1e-4f || instance[p]) continue;
    float t = h / dir[2]; if (t != depth[p]) continue;
    float x = t * dir[0] - b[0], y = t * dir[1] - b[1], lx = fabsf(c * x + s * y), ly = fabsf(-s * x + c * y);
    if (lx >= hl || ly >= hw) continue;
    float k = 0.45f + 0.55f * fmaxf(0, fmaxf(lx - b[3] + grow, ly - b[4] + grow)) / (2 * grow);
    if (k > 1) k = 1;
    for (int i = 0; i < 3; i++) rgb[3 * p + i] *= k;
  }
}

// What a wet road shows of the boxes above it: rays go on upwards from the ground, unsteadily, which draws lights out into streaks.
static void reflect(const Scene *w, const Camera *m, float *rgb, const float *depth, const uint8_t *semantic) {
  int n = m->width * m->height;
  float h = (float)w->height, *seen = malloc(sizeof(float) * 4 * n);  // color and distance of the nearest
  if (seen == NULL) return;
  for (int p = 0; p < n; p++) { for (int i = 0; i < 3; i++) seen[4 * p + i] = w->sky_low[i]; seen[4 * p + 3] = 1e9f; }
  for (int k = 0; k < w->n_boxes; k++) {
    const float *b = w->boxes + k * BOX_FLOATS;
    float c = cosf(b[2]), s = sinf(b[2]);
    int r[4];
    if (!rectangle(m, b, h, b[3], b[4], -1.6f * b[6], 0, r)) continue;
    for (int v = r[1]; v <= r[3]; v++) for (int u = r[0]; u <= r[2]; u++) {
      int p = v * m->width + u;
      if (semantic[p] != ROAD && semantic[p] != LANE) continue;
      float dir[3]; ray(m, u, v, dir);
      float t = depth[p], X = t * dir[0], Y = t * dir[1], tn = 1e-3f;
      float slope = dir[2] * (0.65f + 0.7f * (hash3(u, v, w->seed) >> 8) * (1.0f / 16777216.0f)); int axis, sign;
      float o[3] = {c * (X - b[0]) + s * (Y - b[1]), -s * (X - b[0]) + c * (Y - b[1]), 0}, d[3] = {c * dir[0] + s * dir[1], -s * dir[0] + c * dir[1], slope};
      if (!slabs(b, o, d, b[5], b[6], &tn, &axis, &sign) || tn >= seen[4 * p + 3]) continue;
      seen[4 * p + 3] = tn;
      shade_box(w, b, o, d, tn, axis, sign, X + tn * dir[0], Y + tn * dir[1], t + tn, seen + 4 * p);
    }
  }
  for (int v = 0; v < m->height; v++) for (int u = 0; u < m->width; u++) {
    int p = v * m->width + u;
    if (semantic[p] != ROAD && semantic[p] != LANE) continue;
    float dir[3]; ray(m, u, v, dir);
    float X = depth[p] * dir[0], Y = depth[p] * dir[1], cosine = dir[2] / sqrtf(dir[0] * dir[0] + dir[1] * dir[1] + dir[2] * dir[2]), grazing = 1 - cosine;
    float fresnel = 0.02f + 0.98f * grazing * grazing * grazing * grazing * grazing;
    float k = w->mirror * fresnel * (0.35f + 0.65f * noise((X + (float)w->s0) * 0.4f, Y * 0.9f, w->seed + 40));  // it lies in puddles
    for (int i = 0; i < 3; i++) rgb[3 * p + i] += k * (seen[4 * p + i] - rgb[3 * p + i]);
  }
  free(seen);
}

static inline float uniform(uint32_t a, uint32_t b, uint32_t c) { return (hash3(a, b, c) >> 8) * (1.0f / 16777216.0f); }

// Streaks of falling drops, new in every picture, and drops on the glass before the lens, which stay for a second or two.
static void fall(const Scene *w, int width, int height, double time, float *rgb) {
  float scale = width / 526.0f, glow[3];
  uint32_t now = (uint32_t)llround(time * 1e6);
  for (int i = 0; i < 3; i++) glow[i] = 0.9f * w->sky_low[i] + 0.12f * (w->ambient[i] + w->headlight + w->street_light);
  float slant = 0.25f * (uniform(1, 2, w->seed + 50) - 0.5f);
  for (int k = 0, count = (int)(420 * w->rain); k < count; k++) {
    float x = uniform(k, now, w->seed + 51) * width, y = uniform(k, now, w->seed + 52) * height * 1.1f, near = uniform(k, now, w->seed + 53);
    float length = (5 + 22 * near * near) * scale, half = (0.35f + 0.5f * near) * scale, opacity = 0.10f + 0.22f * (1 - near);
    for (int v = (int)fmaxf(0, y - length); v < y && v < height; v++) {
      float center = x + slant * (v - y) + (x - 0.5f * width) / width * 0.5f * (y - v);  // they come towards the camera
      for (int u = (int)fmaxf(0, center - half - 1); u <= center + half + 1 && u < width; u++) {
        float a = opacity * fminf(1, fmaxf(0, half + 0.5f - fabsf(u - center)));
        for (int i = 0; i < 3; i++) rgb[3 * (v * width + u) + i] += a * (glow[i] - rgb[3 * (v * width + u) + i]);
      }
    }
  }
  float *dry = malloc(sizeof(float) * 3 * width * height);
  if (dry == NULL) return;
  memcpy(dry, rgb, sizeof(float) * 3 * width * height);
  for (int k = 0, count = (int)(70 * w->rain); k < count; k++) {
    float life = 0.7f + 1.8f * uniform(k, 3, w->seed + 54), age = (float)time / life + uniform(k, 4, w->seed + 54);
    uint32_t turn = (uint32_t)age;  // each time the drop is another one
    float cx = uniform(k, turn, w->seed + 55) * width, cy = (uniform(k, turn, w->seed + 56) + 0.02f * (age - turn)) * height;
    float size = uniform(k, turn, w->seed + 57), radius = (1.5f + 7 * size * size * size) * scale;
    for (int v = (int)fmaxf(0, cy - radius); v <= cy + radius && v < height; v++) for (int u = (int)fmaxf(0, cx - radius); u <= cx + radius && u < width; u++) {
      float x = (u - cx) / radius, y = (v - cy) / radius, q = x * x + y * y;
      if (q >= 1) continue;
      int su = (int)(cx - x * radius * 5), sv = (int)(cy - y * radius * 5);  // a drop shows the scene wide, and upside down
      su = su < 0 ? 0 : su >= width ? width - 1 : su; sv = sv < 0 ? 0 : sv >= height ? height - 1 : sv;
      float a = 0.75f * fminf(1, 3 * (1 - q)), rim = 0.75f + 0.35f * -y;
      for (int i = 0; i < 3; i++) { float *c = rgb + 3 * (v * width + u) + i; *c += a * (rim * dry[3 * (sv * width + su) + i] - *c); }
    }
  }
  free(dry);
}

// R: calib_from_view (row-major 3x3); K: fx, fy, cx, cy in pixels. Outputs are (height, width[, 3]), row-major; rgb is linear float, and may be NULL.
// alone: per identity, 65536 counts, how many pixels it would fill with nothing before it; stamp: (height, width) of work space. Both may be NULL.
void raycast(const Scene *w, const double *R, const double *K, int width, int height, double time, float *rgb, float *depth, uint8_t *semantic,
             uint16_t *instance, int32_t *alone, uint16_t *stamp) {
  double *parts = malloc(sizeof(double) * 3 * (width + height));
  if (parts == NULL) abort();
  const Camera m = {R, K, width, height, parts, parts + 3 * width};
  for (int u = 0; u < width; u++) for (int i = 0; i < 3; i++) m.across[3 * u + i] = R[i * 3] * ((u - K[2]) / K[0]);
  for (int v = 0; v < height; v++) for (int i = 0; i < 3; i++) m.down[3 * v + i] = R[i * 3 + 1] * ((v - K[3]) / K[1]);
  float h = (float)w->height;
  if (alone) memset(stamp, 0, sizeof(uint16_t) * width * height);
  for (int v = 0; v < height; v++) for (int u = 0; u < width; u++) {
    float dir[3]; int p = v * width + u;
    ray(&m, u, v, dir);
    instance[p] = 0; semantic[p] = BACKGROUND; depth[p] = INFINITY;
    if (dir[2] > 1e-4f) {
      float t = h / dir[2];
      if (t < 1500) { depth[p] = t; ground(w, t * dir[0], t * dir[1], t, rgb ? rgb + 3 * p : NULL, semantic + p); continue; }
    }
    if (rgb) sky(w, dir, rgb + 3 * p);
  }
  for (int n = 0; rgb && n < w->n_boxes; n++) {
    const float *b = w->boxes + n * BOX_FLOATS;
    if ((int)b[10] != BACKGROUND && b[5] <= 0.6f) shadow(w, &m, b, rgb, depth, instance);
  }
  for (int n = 0; n < w->n_boxes; n++) {
    const float *b = w->boxes + n * BOX_FLOATS;
    float c = cosf(b[2]), s = sinf(b[2]), o[3] = {-(c * b[0] + s * b[1]), -(-s * b[0] + c * b[1]), h};
    uint16_t id = (uint16_t)b[11];
    int r[4];
    if (!rectangle(&m, b, h, b[3], b[4], b[5], b[6], r)) continue;
    for (int v = r[1]; v <= r[3]; v++) for (int u = r[0]; u <= r[2]; u++) {
      float dir[3], t = 0.3f; int p = v * width + u, axis, sign;
      ray(&m, u, v, dir);
      float d[3] = {c * dir[0] + s * dir[1], -s * dir[0] + c * dir[1], -dir[2]};
      if (!slabs(b, o, d, b[5], b[6], &t, &axis, &sign)) continue;
      if (alone && id && stamp[p] != id) { stamp[p] = id; alone[id]++; }  // the boxes of one identity follow each other
      if (t >= depth[p]) continue;
      if (rgb) shade_box(w, b, o, d, t, axis, sign, t * dir[0], t * dir[1], t, rgb + 3 * p);
      depth[p] = t; semantic[p] = (uint8_t)b[10]; instance[p] = id;
    }
  }
  if (rgb && w->mirror > 0) reflect(w, &m, rgb, depth, semantic);
  if (rgb && w->rain > 0) fall(w, width, height, time, rgb);
  free(parts);
}

// Exposure, the sensor's noise and the display curve: linear (n, 3) and noise (n) -> rgb (n, 3) through a table of 4096.
void develop(const float *linear, const float *noise, const uint8_t *curve, float exposure, float level, int n, uint8_t *rgb) {
  for (int p = 0; p < n; p++) {
    float add = noise[p] * level;
    for (int i = 0; i < 3; i++) {
      float x = linear[3 * p + i] * exposure + add;
      x = x < 0 ? 0 : x > 1 ? 1 : x;
      rgb[3 * p + i] = curve[(int)(x * 4095 + 0.5f)];
    }
  }
}
