#include <fcntl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <random>
#include <stdexcept>
#include <system_error>
#include <vector>

#include "check.h"
#include "memory/assemble.h"
#include "memory/cuda_driver.h"
#include "memory/lines.h"
#include "memory/memfd.h"
#include "memory/pack.h"
#include "memory/threads.h"

namespace {

using namespace pyrlk;

// The definition of pack.h, word by word.
std::uint64_t truth(const unsigned char* data, std::size_t bytes) {
  std::uint64_t sum = 0;
  for (std::size_t at = 0; at < bytes; at += 4) {
    std::uint64_t word = 0;
    for (std::size_t k = 0; k < 4 && at + k < bytes; ++k) {
      word |= static_cast<std::uint64_t>(data[at + k]) << (8 * k);
    }
    sum += word * (2 * (at / 4) + 1);
  }
  return sum;
}

std::vector<unsigned char> noise(std::size_t bytes, unsigned seed) {
  std::mt19937_64 random(seed);
  std::vector<unsigned char> data(bytes);
  for (auto& byte : data) byte = static_cast<unsigned char>(random());
  return data;
}

Piece flat_piece(void* data, std::uint64_t offset, std::int64_t bytes) {
  Piece piece{};
  piece.data = data;
  piece.offset = offset;
  piece.itemsize = 1;
  piece.ndim = 1;
  piece.sizes[0] = bytes;
  piece.strides[0] = 1;
  return piece;
}

std::uint64_t sum_of(const std::vector<unsigned char>& data, int threads = 1) {
  const Range range{0, data.size()};
  std::uint64_t sum = 0;
  checksum(data.data(), data.size(), &range, 1, threads, &sum);
  return sum;
}

std::vector<const LineOps*> variants() {
  std::vector<const LineOps*> all{&lines_base()};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) all.push_back(&lines_avx2());
  if (__builtin_cpu_supports("avx512f")) all.push_back(&lines_avx512());
#endif
  return all;
}

// Lengths around the line, the unrolling and the word: every tail of 64 bytes.
void every_variant_equals_the_definition() {
  for (const LineOps* ops : variants()) {
    for (std::size_t bytes = 0; bytes < 300; ++bytes) {
      const auto data = noise(bytes + 1, static_cast<unsigned>(bytes));
      const std::uint64_t want = truth(data.data() + 1, bytes);
      alignas(64) unsigned char copy[384] = {};
      const char* src = reinterpret_cast<const char*>(data.data() + 1);
      CHECK(ops->sum(src, bytes, 0, src) == want);
      CHECK(ops->copy_sum(reinterpret_cast<char*>(copy), src, bytes, 0, src) == want);
      CHECK(std::memcmp(copy, data.data() + 1, bytes) == 0);
      std::memset(copy, 0, sizeof copy);
      CHECK(ops->stream_sum(reinterpret_cast<char*>(copy), src, bytes, 0, src) == want);
      CHECK(std::memcmp(copy, data.data() + 1, bytes) == 0);
      CHECK(copy[bytes] == 0);
      std::memset(copy, 0, sizeof copy);
      ops->stream(reinterpret_cast<char*>(copy), src, bytes, 0, src);
      CHECK(std::memcmp(copy, data.data() + 1, bytes) == 0);
      CHECK(copy[bytes] == 0);
    }
  }
}

void sums_are_additive_over_ranges() {
  const auto data = noise(5000, 1);
  const char* src = reinterpret_cast<const char*>(data.data());
  for (const LineOps* ops : variants()) {
    for (std::size_t cut = 0; cut < 5000; cut += 64) {
      CHECK(ops->sum(src, cut, 0, src) + ops->sum(src + cut, 5000 - cut, cut / 4, nullptr) ==
            truth(data.data(), 5000));
    }
  }
}

void every_flipped_bit_and_swapped_pair_shows() {
  auto data = noise(1021, 2);
  const std::uint64_t want = sum_of(data);
  for (std::size_t bit = 0; bit < data.size() * 8; ++bit) {
    data[bit / 8] ^= static_cast<unsigned char>(1u << (bit % 8));
    CHECK(sum_of(data) != want);
    data[bit / 8] ^= static_cast<unsigned char>(1u << (bit % 8));
  }
  // The hard pairs differ in one bit only, the sign of a float among them.
  for (int bit = 0; bit < 32; ++bit) {
    for (std::size_t distance = 1; distance < 200; ++distance) {
      std::vector<unsigned char> words(1024, 0);
      words[static_cast<std::size_t>(bit / 8)] = static_cast<unsigned char>(1u << (bit % 8));
      const std::uint64_t before = sum_of(words);
      std::swap_ranges(words.begin(), words.begin() + 4, words.begin() + 4 * distance);
      CHECK(sum_of(words) != before);
    }
  }
}

// Sizes around the grain (1 MiB) and the streaming limit; one and three threads; odd offsets.
void pack_and_unpack_invert_each_other() {
  for (const int threads : {1, 3}) {
    const std::vector<std::size_t> sizes{0, 1, 4095, (1 << 20) - 1, (1 << 20) + 7, 20 << 20};
    std::vector<std::vector<unsigned char>> sources, targets;
    std::vector<Piece> in, out;
    std::uint64_t offset = 0;
    for (const std::size_t size : sizes) {
      sources.push_back(noise(size, static_cast<unsigned>(size)));
      targets.emplace_back(size);
    }
    for (std::size_t i = 0; i < sizes.size(); ++i) {
      const auto bytes = static_cast<std::int64_t>(sizes[i]);
      in.push_back(flat_piece(sources[i].data(), offset, bytes));
      out.push_back(flat_piece(targets[i].data(), offset, bytes));
      offset = (offset + sizes[i] + 255) / 256 * 256;
    }
    std::vector<unsigned char> buffer(offset, 0xee);
    std::vector<std::uint64_t> packed(sizes.size()), unpacked(sizes.size());
    pack(buffer.data(), offset, in.data(), in.size(), threads, packed.data());
    unpack(buffer.data(), offset, out.data(), out.size(), threads, unpacked.data());
    for (std::size_t i = 0; i < sizes.size(); ++i) {
      CHECK(sources[i] == targets[i]);
      CHECK(packed[i] == truth(sources[i].data(), sizes[i]));
      CHECK(unpacked[i] == packed[i]);
    }
    // A plain copy moves the same bytes.
    std::vector<unsigned char> plain(offset, 0xee);
    pack(plain.data(), offset, in.data(), in.size(), threads, nullptr);
    CHECK(plain == buffer);
  }
}

// Thousands of pieces a grain, empty and odd ones among them; large ones that several threads cut.
void many_pieces_are_divided_by_bytes() {
  std::mt19937 random(7);
  std::vector<std::vector<unsigned char>> sources;
  for (int i = 0; i < 3000; ++i) sources.push_back(noise(random() % 9000, random()));
  for (int i = 0; i < 3; ++i) sources.push_back(noise((3 << 20) + random() % 99, random()));
  sources.emplace_back();
  std::vector<Piece> pieces;
  std::vector<Range> ranges;
  std::uint64_t offset = 0;
  for (auto& source : sources) {
    pieces.push_back(flat_piece(source.data(), offset, static_cast<std::int64_t>(source.size())));
    ranges.push_back({offset, source.size()});
    offset = (offset + source.size() + 255) / 256 * 256;
  }
  for (const int threads : {1, 4}) {
    std::vector<unsigned char> buffer(offset), plain(offset);
    std::vector<std::uint64_t> packed(sources.size()), summed(sources.size());
    pack(buffer.data(), offset, pieces.data(), pieces.size(), threads, packed.data());
    pack(plain.data(), offset, pieces.data(), pieces.size(), threads, nullptr);
    checksum(buffer.data(), offset, ranges.data(), ranges.size(), threads, summed.data());
    CHECK(plain == buffer);
    for (std::size_t i = 0; i < sources.size(); ++i) {
      CHECK(std::equal(sources[i].begin(), sources[i].end(),
                       buffer.begin() + static_cast<std::ptrdiff_t>(ranges[i].offset)));
      CHECK(packed[i] == truth(sources[i].data(), sources[i].size()));
      CHECK(summed[i] == packed[i]);
    }
  }
}

// A transposed view of every item size: packed in logical order.
template <typename T>
void strided_pieces_are_packed_in_logical_order() {
  const int rows = 37, columns = 1031;
  std::vector<T> source(rows * columns), want, buffer(rows * columns), back(rows * columns);
  for (std::size_t i = 0; i < source.size(); ++i) source[i] = static_cast<T>(i * 2654435761u);
  for (int c = 0; c < columns; ++c) {
    for (int r = 0; r < rows; ++r) want.push_back(source[r * columns + c]);
  }
  Piece piece{};
  piece.data = source.data();
  piece.itemsize = sizeof(T);
  piece.ndim = 3;
  piece.sizes[0] = columns, piece.sizes[1] = 1, piece.sizes[2] = rows;
  piece.strides[0] = 1, piece.strides[1] = 77, piece.strides[2] = columns;
  const std::uint64_t bytes = source.size() * sizeof(T);
  std::uint64_t sum = 0, again = 0;
  pack(buffer.data(), bytes, &piece, 1, 2, &sum);
  CHECK(buffer == want);
  CHECK(sum == truth(reinterpret_cast<unsigned char*>(want.data()), bytes));
  piece.data = back.data();
  unpack(buffer.data(), bytes, &piece, 1, 2, &again);
  CHECK(back == source);
  CHECK(again == sum);
}

// [R, C] of shorts from a grid of parts, cut at odd places, the parts transposed in memory or not:
// every row length below and above a line, a tile, a grain.
void parts_become_whole_tensors() {
  const std::vector<std::pair<std::int64_t, std::int64_t>> shapes{
      {1, 1}, {7, 3}, {64, 33}, {301, 129}, {1000, 40}, {5, 9000}, {3, 600001}, {9000001, 1}};
  for (const auto& [rows, columns] : shapes) {
    const std::int64_t count = rows * columns;
    const auto want = noise(2 * static_cast<std::size_t>(count), 9);
    const auto* shorts = reinterpret_cast<const std::uint16_t*>(want.data());
    for (const bool transposed : {false, true}) {
      const std::vector<std::int64_t> row_cuts{0, rows / 3, rows / 2, rows};
      const std::vector<std::int64_t> column_cuts{0, columns / 2, columns};
      std::vector<std::vector<std::uint16_t>> data;
      std::vector<Part> parts;
      for (std::size_t i = 1; i < row_cuts.size(); ++i) {
        for (std::size_t j = 1; j < column_cuts.size(); ++j) {
          const std::int64_t r0 = row_cuts[i - 1], c0 = column_cuts[j - 1];
          const std::int64_t m = row_cuts[i] - r0, n = column_cuts[j] - c0;
          auto& part = data.emplace_back(static_cast<std::size_t>(m * n));
          for (std::int64_t r = 0; r < m; ++r) {
            for (std::int64_t c = 0; c < n; ++c) {
              part[transposed ? c * m + r : r * n + c] = shorts[(r0 + r) * columns + c0 + c];
            }
          }
          parts.push_back(
              {part.data(), {r0, c0}, {m, n}, {transposed ? 1 : n, transposed ? m : 1}});
        }
      }
      for (const int threads : {1, 3}) {
        for (const bool summed : {false, true}) {
          std::vector<unsigned char> got(want.size() + 256, 0xA5);
          const Whole whole{128, 2, 2, {rows, columns}, parts.size()};
          std::uint64_t sum = 0;
          assemble(got.data(), got.size(), &whole, 1, parts.data(), parts.size(), threads,
                   summed ? &sum : nullptr);
          CHECK(std::equal(want.begin(), want.end(), got.begin() + 128));
          CHECK(std::all_of(got.begin(), got.begin() + 128, [](auto b) { return b == 0xA5; }));
          CHECK(std::all_of(got.end() - 128, got.end(), [](auto b) { return b == 0xA5; }));
          if (summed) CHECK(sum == truth(want.data(), want.size()));
        }
      }
    }
  }
}

void parts_that_leave_their_tensor_are_refused() {
  std::vector<unsigned char> data(64), buffer(64);
  const Whole whole{0, 1, 2, {4, 8}, 1};
  const auto refused = [&](const Whole& w, const Part& p, std::size_t parts) {
    bool thrown = false;
    try {
      assemble(buffer.data(), buffer.size(), &w, 1, &p, parts, 1, nullptr);
    } catch (const std::invalid_argument&) {
      thrown = true;
    }
    CHECK(thrown);
  };
  refused(whole, {data.data(), {0, 4}, {4, 5}, {8, 1}}, 1);
  refused(whole, {data.data(), {-1, 0}, {1, 8}, {8, 1}}, 1);
  refused(whole, {data.data(), {0, 0}, {4, 8}, {-8, 1}}, 1);
  refused(whole, {data.data(), {0, 0}, {4, 8}, {8, 1}}, 0);
  refused({40, 1, 2, {4, 8}, 1}, {data.data(), {0, 0}, {4, 8}, {8, 1}}, 1);
  refused({0, 1, 0, {}, 1}, {data.data(), {}, {}, {}}, 1);
  refused({0, 1, 2, {4, 8}, 0}, {data.data(), {0, 0}, {4, 8}, {8, 1}}, 1);
}

void bad_pieces_are_refused() {
  char data[64], buffer[64];
  auto packed = [&](Piece piece) { pack(buffer, sizeof buffer, &piece, 1, 1, nullptr); };
  Piece leaves = flat_piece(data, 60, 5);
  CHECK_THROWS(std::invalid_argument, (packed(leaves), 0));
  leaves.offset = ~std::uint64_t{0} - 1;
  CHECK_THROWS(std::invalid_argument, (packed(leaves), 0));
  Piece huge = flat_piece(data, 0, 1);
  huge.ndim = 3;
  for (int d = 0; d < 3; ++d) huge.sizes[d] = std::int64_t{1} << 40, huge.strides[d] = 0;
  CHECK_THROWS(std::invalid_argument, (packed(huge), 0));
  Piece backwards = flat_piece(data, 0, 2);
  backwards.strides[0] = -1;
  CHECK_THROWS(std::invalid_argument, (packed(backwards), 0));
  Piece odd = flat_piece(data, 0, 1);
  odd.itemsize = 0;
  CHECK_THROWS(std::invalid_argument, (packed(odd), 0));
}

void a_segment_is_sealed_and_opens_read_only() {
  const std::uint64_t bytes = 3 * 4096 + 5;
  const Segment segment = segment_create(bytes);
  const int seals = fcntl(segment.fd, F_GET_SEALS);
  CHECK((seals & F_SEAL_SHRINK) && (seals & F_SEAL_GROW) && (seals & F_SEAL_SEAL));
  CHECK(ftruncate(segment.fd, 0) != 0);
  CHECK(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, segment.fd, 0) == MAP_FAILED);
  std::memset(segment.address, 7, bytes);
  char* view = static_cast<char*>(segment_open(segment.fd, bytes));
  CHECK(view[0] == 7 && view[bytes - 1] == 7);
  CHECK_THROWS(std::system_error, segment_open(segment.fd, bytes + 1));
  segment_close(view, bytes);
  segment_close(segment.address, bytes);
  close(segment.fd);
}

void what_could_shrink_is_not_opened() {
  const int fd = memfd_create("unsealed", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  CHECK(ftruncate(fd, 4096) == 0);
  CHECK_THROWS(std::system_error, segment_open(fd, 4096));
  close(fd);
  const int file = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
  CHECK_THROWS(std::system_error, segment_open(file, 4096));
  close(file);
  CHECK_THROWS(std::system_error, segment_open(-1, 4096));
}

void too_much_memory_is_an_error() {
  CHECK_THROWS(std::system_error, segment_create(std::uint64_t{1} << 50));
  CHECK_THROWS(std::system_error, segment_create(0));
  CHECK_THROWS(std::system_error, segment_create(~std::uint64_t{0}));
}

// The parent has used its pool; without the rule the child's pack would wait for ever.
void a_forked_child_packs_alone() {
  const auto data = noise(20 << 20, 9);
  const std::uint64_t want = sum_of(data, 3);
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);
    _exit(usable_threads(8) == 1 && sum_of(data, 3) == want ? 0 : 1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  CHECK(usable_threads(8) == 8 && usable_threads(0) == 1);
}

}  // namespace

int main() {
  every_variant_equals_the_definition();
  sums_are_additive_over_ranges();
  every_flipped_bit_and_swapped_pair_shows();
  pack_and_unpack_invert_each_other();
  many_pieces_are_divided_by_bytes();
  strided_pieces_are_packed_in_logical_order<std::uint8_t>();
  strided_pieces_are_packed_in_logical_order<std::uint16_t>();
  strided_pieces_are_packed_in_logical_order<std::uint32_t>();
  strided_pieces_are_packed_in_logical_order<std::uint64_t>();
  parts_become_whole_tensors();
  parts_that_leave_their_tensor_are_refused();
  bad_pieces_are_refused();
  a_segment_is_sealed_and_opens_read_only();
  what_could_shrink_is_not_opened();
  too_much_memory_is_an_error();
  a_forked_child_packs_alone();
  if (failures() != 0) std::fprintf(stderr, "%d checks failed\n", failures());
  return failures() == 0 ? 0 : 1;
}
