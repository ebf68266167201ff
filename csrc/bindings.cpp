// The only file here that knows Python. Tensors arrive as addresses (tensor.data_ptr()) and sizes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <system_error>
#include <vector>

#include "kernels/kernels.h"
#include "memory/assemble.h"
#include "memory/cuda_driver.h"
#include "memory/dlpack.h"
#include "memory/memfd.h"
#include "memory/pack.h"
#include "memory/scatter.h"
#include "memory/threads.h"
#include "memory/warm_pages.h"

namespace py = pybind11;

namespace {

// A tensor in warm pages, as DLPack describes it to torch.
struct WarmTensor {
  DLManagedTensor managed;
  std::vector<int64_t> shape;

  static void release(DLManagedTensor* self) {
    auto* made = static_cast<WarmTensor*>(self->manager_ctx);
    pyrlk::give_back_warm_pages(made->managed.dl_tensor.data);
    delete made;
  }
};

// A capsule for torch.from_dlpack, or None where the system has no such memory.
py::object warm_tensor(const std::vector<int64_t>& shape, int dtype) {
  const auto type = static_cast<pyrlk::DType>(dtype);
  const auto item = static_cast<std::size_t>(pyrlk::item_size(type));
  std::size_t bytes = item;
  for (const int64_t n : shape) bytes *= static_cast<std::size_t>(n);
  auto made = std::make_unique<WarmTensor>();
  made->shape = shape;
  void* block = nullptr;
  {
    py::gil_scoped_release nogil;
    block = pyrlk::take_warm_pages(bytes);
  }
  if (block == nullptr) return py::none();
  const auto code = uint8_t(type == pyrlk::DType::kBFloat16 ? 4 : 2);
  made->managed.dl_tensor = {
      block,   {1, 0}, int32_t(shape.size()), {code, uint8_t(8 * item), 1}, made->shape.data(),
      nullptr, 0};
  made->managed.manager_ctx = made.get();
  made->managed.deleter = WarmTensor::release;
  // A consumer renames the capsule; under its first name nobody took the tensor.
  PyObject* capsule = PyCapsule_New(&made->managed, "dltensor", [](PyObject* self) {
    if (!PyCapsule_IsValid(self, "dltensor")) return;
    auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(self, "dltensor"));
    managed->deleter(managed);
  });
  if (capsule == nullptr) {
    pyrlk::give_back_warm_pages(block);
    throw py::error_already_set();
  }
  made.release();
  return py::reinterpret_steal<py::object>(capsule);
}

void bind_warm_pages(py::module_& module) {
  module.def("warm_tensor", warm_tensor);
  module.def("release_warm_pages", &pyrlk::release_warm_pages,
             py::call_guard<py::gil_scoped_release>());
  module.def("warm_pages", [] {
    const pyrlk::WarmPages w = pyrlk::warm_pages();
    return py::make_tuple(w.used, w.kept);
  });
}

// kernels/: row statistics, losses, sampling.
void bind_kernels(py::module_& module) {
  using Address = std::uint64_t;  // 0 is null
  // (address, dtype, rows, vocab, width, inner, stride_outer, stride_inner): see kernels::Rows.
  using PyRows = std::tuple<Address, int, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;
  using PyTemperature = std::tuple<double, Address>;
  using PyKept = std::pair<Address, Address>;  // ids, offsets
  // (clipped, eps_low, eps_high, dual_clip, delta, kl, kl_coef, kl_importance, entropy_coef)
  using PyTerms = std::tuple<bool, double, double, double, double, int, double, bool, double>;
  static const auto pointer = [](Address address) { return reinterpret_cast<void*>(address); };
  static const auto int64s = [](Address address) { return reinterpret_cast<int64_t*>(address); };
  static const auto int32s = [](Address address) { return reinterpret_cast<int32_t*>(address); };
  static const auto floats = [](Address address) { return reinterpret_cast<float*>(address); };
  static const auto uint8s = [](Address address) { return reinterpret_cast<uint8_t*>(address); };
  static const auto uint32s = [](Address address) { return reinterpret_cast<uint32_t*>(address); };
  static const auto to_rows = [](const PyRows& r) {
    const auto& [data, dtype, count, vocab, width, inner, outer_stride, inner_stride] = r;
    return pyrlk::Rows{pointer(data), pyrlk::DType(dtype), count,       vocab, width,
                       inner,         outer_stride,        inner_stride};
  };
  static const auto to_temperature = [](const PyTemperature& t) {
    return pyrlk::Temperature{std::get<0>(t), pointer(std::get<1>(t))};
  };
  static const auto to_kept = [](const PyKept& k) {
    return pyrlk::KeptIds{int32s(k.first), int64s(k.second)};
  };
  static const auto to_terms = [](const PyTerms& t) {
    const auto& [clipped, low, high, dual_clip, delta, kl, kl_coef, kl_importance, entropy] = t;
    return pyrlk::Terms{clipped, low, high, dual_clip, delta, kl, kl_coef, kl_importance, entropy};
  };

  module.def("cpu_isa", [] { return std::string(pyrlk::row_kernels().name); });
  module.def(
      "set_isa", [](const std::string& name) { return pyrlk::set_isa(name.c_str()); },
      py::arg("name"));
  module.def(
      "token_logprobs",
      [](const PyRows& logits, Address tokens, const PyKept& kept, const PyTemperature& temperature,
         Address logprob, Address entropy, Address stats, int threads) {
        const py::gil_scoped_release nogil;
        return pyrlk::token_logprobs(to_rows(logits), int64s(tokens), to_kept(kept),
                                     to_temperature(temperature), pointer(logprob),
                                     pointer(entropy), pointer(stats), threads);
      },
      py::arg("logits"), py::arg("tokens"), py::arg("kept"), py::arg("temperature"),
      py::arg("logprob"), py::arg("entropy"), py::arg("stats"), py::arg("threads"));
  module.def(
      "token_logprobs_backward",
      [](const PyRows& logits, Address tokens, const PyKept& kept, const PyTemperature& temperature,
         Address stats, Address grad_logprob, Address grad_entropy, const PyRows& grad,
         int threads) {
        const py::gil_scoped_release nogil;
        pyrlk::token_logprobs_backward(
            to_rows(logits), int64s(tokens), to_kept(kept), to_temperature(temperature),
            pointer(stats), pointer(grad_logprob), pointer(grad_entropy), to_rows(grad), threads);
      },
      py::arg("logits"), py::arg("tokens"), py::arg("kept"), py::arg("temperature"),
      py::arg("stats"), py::arg("grad_logprob"), py::arg("grad_entropy"), py::arg("grad"),
      py::arg("threads"));
  module.def(
      "policy_loss",
      [](const PyRows& logits, Address tokens, const PyKept& kept, Address old_logprobs,
         Address advantages, Address weight, Address ref_logprobs, const PyTemperature& temperature,
         const PyTerms& terms, Address loss, Address logprob, Address entropy,
         const std::optional<PyRows>& grad, int threads) {
        const pyrlk::Rows out = grad ? to_rows(*grad) : pyrlk::Rows{};
        const pyrlk::PolicyLossArgs args{to_rows(logits),       int64s(tokens),
                                         to_kept(kept),         pointer(old_logprobs),
                                         pointer(advantages),   pointer(weight),
                                         pointer(ref_logprobs), to_temperature(temperature),
                                         to_terms(terms),       pointer(loss),
                                         pointer(logprob),      pointer(entropy),
                                         grad ? &out : nullptr};
        const py::gil_scoped_release nogil;
        return pyrlk::policy_loss(args, threads);
      },
      py::arg("logits"), py::arg("tokens"), py::arg("kept"), py::arg("old_logprobs"),
      py::arg("advantages"), py::arg("weight"), py::arg("ref_logprobs"), py::arg("temperature"),
      py::arg("terms"), py::arg("loss"), py::arg("logprob"), py::arg("entropy"), py::arg("grad"),
      py::arg("threads"));
  module.def(
      "reinforce_grad",
      [](const PyRows& logits, Address tokens, Address advantages, const PyTemperature& temperature,
         const PyRows& out, int threads) {
        const py::gil_scoped_release nogil;
        return pyrlk::reinforce_grad(to_rows(logits), int64s(tokens), pointer(advantages),
                                     to_temperature(temperature), to_rows(out), threads);
      },
      py::arg("logits"), py::arg("tokens"), py::arg("advantages"), py::arg("temperature"),
      py::arg("out"), py::arg("threads"));
  module.def(
      "scale",
      [](Address x, int dtype, int64_t count, double factor, int threads) {
        const py::gil_scoped_release nogil;
        pyrlk::scale(pointer(x), pyrlk::DType(dtype), count, factor, threads);
      },
      py::arg("x"), py::arg("dtype"), py::arg("count"), py::arg("factor"), py::arg("threads"));

  py::class_<pyrlk::KeptSets>(module, "KeptSets")
      .def(py::init<int64_t>(), py::arg("rows"))
      .def("total", &pyrlk::KeptSets::total)
      .def(
          "write",
          [](const pyrlk::KeptSets& self, Address ids, int64_t capacity, Address offsets,
             Address bits, int64_t words, Address status, int threads) {
            const py::gil_scoped_release nogil;
            self.write(static_cast<int32_t*>(pointer(ids)), capacity, int64s(offsets),
                       static_cast<uint32_t*>(pointer(bits)), words, uint8s(status), threads);
          },
          py::arg("ids"), py::arg("capacity"), py::arg("offsets"), py::arg("bits"),
          py::arg("words"), py::arg("status"), py::arg("threads"));
  module.def(
      "sample",
      [](const PyRows& logits, Address temperature, Address top_k, Address top_p, Address min_p,
         Address seed, Address position, Address allowed, bool joint, bool keep_ties, Address token,
         Address logprob, Address full_logprob, Address kept, Address status,
         pyrlk::KeptSets* support, int threads) {
        const pyrlk::SampleArgs args{to_rows(logits),
                                     floats(temperature),
                                     floats(top_p),
                                     floats(min_p),
                                     int64s(top_k),
                                     int64s(seed),
                                     int64s(position),
                                     uint32s(allowed),
                                     joint,
                                     keep_ties,
                                     int64s(token),
                                     floats(logprob),
                                     floats(full_logprob),
                                     int32s(kept),
                                     uint8s(status),
                                     support};
        const py::gil_scoped_release nogil;
        return pyrlk::sample(args, threads);
      },
      py::arg("logits"), py::arg("temperature"), py::arg("top_k"), py::arg("top_p"),
      py::arg("min_p"), py::arg("seed"), py::arg("position"), py::arg("allowed"), py::arg("joint"),
      py::arg("keep_ties"), py::arg("token"), py::arg("logprob"), py::arg("full_logprob"),
      py::arg("kept"), py::arg("status"), py::arg("support"), py::arg("threads"));
  // (logits, first, temperature, top_k, top_p, min_p, seed, position, allowed, words, joint,
  // keep_ties) of a shard.
  using PyShard = std::tuple<PyRows, int64_t, Address, Address, Address, Address, Address, Address,
                             Address, int64_t, bool, bool>;
  static const auto to_shard = [](const PyShard& t) {
    const auto floats = [](Address a) { return static_cast<float*>(pointer(a)); };
    const auto& [logits, first, temperature, top_k, top_p, min_p, seed, position, allowed, words,
                 joint, keep_ties] = t;
    return pyrlk::ShardArgs{to_rows(logits),
                            first,
                            floats(temperature),
                            floats(top_p),
                            floats(min_p),
                            int64s(top_k),
                            int64s(seed),
                            int64s(position),
                            static_cast<const uint32_t*>(pointer(allowed)),
                            words,
                            joint,
                            keep_ties};
  };
  module.attr("shard_header") = pyrlk::kShardHeader;
  // (max, status, vocab) of the whole rows.
  using PyKnown = std::tuple<Address, Address, int64_t>;
  static const auto to_known = [](const PyKnown& t) {
    return pyrlk::Known{static_cast<const float*>(pointer(std::get<0>(t))),
                        static_cast<const uint8_t*>(pointer(std::get<1>(t))), std::get<2>(t)};
  };
  module.def(
      "shard_candidates",
      [](const PyShard& shard, Address rows, int64_t count, const PyKnown& known, int64_t capacity,
         Address out, int threads) {
        const pyrlk::ShardArgs args = to_shard(shard);
        const py::gil_scoped_release nogil;
        pyrlk::shard_candidates(args, int64s(rows), count, to_known(known), capacity,
                                static_cast<float*>(pointer(out)), threads);
      },
      py::arg("shard"), py::arg("rows"), py::arg("count"), py::arg("known"), py::arg("capacity"),
      py::arg("out"), py::arg("threads"));
  module.def(
      "shard_select",
      [](const PyShard& shard, Address parts, int64_t ranks, int64_t rows, int64_t capacity,
         int64_t vocab, Address row_mass, Address token, Address logprob, Address full_logprob,
         Address kept, Address status, Address state, Address max, Address log_sum,
         pyrlk::KeptSets* support, int threads) {
        const auto floats = [](Address a) { return static_cast<float*>(pointer(a)); };
        const auto bytes = [](Address a) { return static_cast<uint8_t*>(pointer(a)); };
        const pyrlk::ShardArgs args = to_shard(shard);
        const pyrlk::SelectArgs select{floats(parts),
                                       ranks,
                                       rows,
                                       capacity,
                                       vocab,
                                       static_cast<const uint64_t*>(pointer(row_mass)),
                                       int64s(token),
                                       floats(logprob),
                                       floats(full_logprob),
                                       static_cast<int32_t*>(pointer(kept)),
                                       bytes(status),
                                       bytes(state),
                                       floats(max),
                                       static_cast<double*>(pointer(log_sum)),
                                       support};
        const py::gil_scoped_release nogil;
        pyrlk::shard_select(args, select, threads);
      },
      py::arg("shard"), py::arg("parts"), py::arg("ranks"), py::arg("rows"), py::arg("capacity"),
      py::arg("vocab"), py::arg("row_mass"), py::arg("token"), py::arg("logprob"),
      py::arg("full_logprob"), py::arg("kept"), py::arg("status"), py::arg("state"), py::arg("max"),
      py::arg("log_sum"), py::arg("support"), py::arg("threads"));
  module.def(
      "shard_masses",
      [](const PyShard& shard, Address rows, int64_t count, const PyKnown& known, Address mass,
         int threads) {
        const pyrlk::ShardArgs args = to_shard(shard);
        const py::gil_scoped_release nogil;
        pyrlk::shard_masses(args, int64s(rows), count, to_known(known),
                            static_cast<uint64_t*>(pointer(mass)), threads);
      },
      py::arg("shard"), py::arg("rows"), py::arg("count"), py::arg("known"), py::arg("mass"),
      py::arg("threads"));
  module.def(
      "shard_draw",
      [](const PyShard& shard, Address rows, int64_t count, Address max, Address masses,
         int64_t ranks, int64_t rank, Address found, int threads) {
        const pyrlk::ShardArgs args = to_shard(shard);
        const py::gil_scoped_release nogil;
        pyrlk::shard_draw(args, int64s(rows), count, static_cast<float*>(pointer(max)),

                          static_cast<const uint64_t*>(pointer(masses)), ranks, rank, int64s(found),
                          threads);
      },
      py::arg("shard"), py::arg("rows"), py::arg("count"), py::arg("max"), py::arg("masses"),
      py::arg("ranks"), py::arg("rank"), py::arg("found"), py::arg("threads"));
  module.def(
      "verify_draft",
      [](const PyRows& target, const std::optional<PyRows>& draft, Address draft_tokens,
         int64_t depth, Address temperature, Address top_k, Address top_p, Address min_p,
         Address seed, Address position, Address token, Address accepted, Address logprob,
         Address full_logprob, Address status, pyrlk::KeptSets* support, int threads) {
        const pyrlk::Rows proposed = draft ? to_rows(*draft) : pyrlk::Rows{};
        const pyrlk::VerifyArgs args{to_rows(target),      draft ? &proposed : nullptr,
                                     int64s(draft_tokens), depth,
                                     floats(temperature),  floats(top_p),
                                     floats(min_p),        int64s(top_k),
                                     int64s(seed),         int64s(position),
                                     int64s(token),        int32s(accepted),
                                     floats(logprob),      floats(full_logprob),
                                     uint8s(status),       support};
        const py::gil_scoped_release nogil;
        return pyrlk::verify_draft(args, threads);
      },
      py::arg("target"), py::arg("draft"), py::arg("draft_tokens"), py::arg("depth"),
      py::arg("temperature"), py::arg("top_k"), py::arg("top_p"), py::arg("min_p"), py::arg("seed"),
      py::arg("position"), py::arg("token"), py::arg("accepted"), py::arg("logprob"),
      py::arg("full_logprob"), py::arg("status"), py::arg("support"), py::arg("threads"));
}

// memory/: packing, shared memory, CUDA handles.
void bind_memory(py::module_& module) {
  using Address = std::uint64_t;
  using Sums = std::vector<std::uint64_t>;
  static const auto pointer = [](Address address) { return reinterpret_cast<void*>(address); };
  // Two array("Q"): of each tensor offset, itemsize, ndim, sizes, strides, the same in every
  // update; and the addresses. Thousands of tensors as Python tuples would set off the garbage
  // collector.
  static const auto numbers = [](const py::buffer& buffer) {
    const py::buffer_info info = buffer.request();
    if (info.itemsize != 8 || info.ndim != 1) throw py::value_error("wanted an array('Q')");
    const auto* at = static_cast<const std::int64_t*>(info.ptr);
    return std::make_pair(at, at + info.size);
  };
  static const auto to_pieces = [](const py::buffer& forms, const py::buffer& addresses) {
    auto [at, end] = numbers(forms);
    auto [address, last] = numbers(addresses);
    std::vector<pyrlk::Piece> pieces;
    pieces.reserve(static_cast<std::size_t>(last - address));
    while (at != end) {
      if (end - at < 3 || at[2] < 0 || at[2] > pyrlk::kMaxDims || end - at < 3 + 2 * at[2]) {
        throw py::value_error("a piece has offset, itemsize, ndim (at most 16), sizes, strides");
      }
      if (address == last) throw py::value_error("fewer addresses than pieces");
      pyrlk::Piece piece{};
      piece.data = pointer(static_cast<Address>(*address++));
      piece.offset = static_cast<std::uint64_t>(at[0]);
      piece.itemsize = static_cast<std::int32_t>(at[1]);
      piece.ndim = static_cast<std::int32_t>(at[2]);
      std::copy_n(at + 3, piece.ndim, piece.sizes);
      std::copy_n(at + 3 + piece.ndim, piece.ndim, piece.strides);
      pieces.push_back(piece);
      at += 3 + 2 * piece.ndim;
    }
    if (address != last) throw py::value_error("more addresses than pieces");
    return pieces;
  };

  module.def("usable_threads", &pyrlk::usable_threads, py::arg("requested"));
  module.def(
      "pack",
      [](Address buffer, std::uint64_t bytes, const py::buffer& forms, const py::buffer& addresses,
         bool checksum, int threads) {
        const auto pieces = to_pieces(forms, addresses);
        Sums sums(checksum ? pieces.size() : 0);
        const py::gil_scoped_release nogil;
        pyrlk::pack(pointer(buffer), bytes, pieces.data(), pieces.size(), threads,
                    checksum ? sums.data() : nullptr);
        return sums;
      },
      py::arg("buffer"), py::arg("buffer_bytes"), py::arg("forms"), py::arg("addresses"),
      py::arg("checksum"), py::arg("threads"));
  module.def(
      "unpack",
      [](Address buffer, std::uint64_t bytes, const py::buffer& forms, const py::buffer& addresses,
         bool checksum, int threads) {
        const auto pieces = to_pieces(forms, addresses);
        Sums sums(checksum ? pieces.size() : 0);
        const py::gil_scoped_release nogil;
        pyrlk::unpack(pointer(buffer), bytes, pieces.data(), pieces.size(), threads,
                      checksum ? sums.data() : nullptr);
        return sums;
      },
      py::arg("buffer"), py::arg("buffer_bytes"), py::arg("forms"), py::arg("addresses"),
      py::arg("checksum"), py::arg("threads"));
  // forms: of each whole offset, itemsize, ndim, parts, sizes, and behind it of each part starts,
  // sizes, strides; addresses: of the parts.
  module.def(
      "assemble",
      [](Address buffer, std::uint64_t bytes, const py::buffer& forms, const py::buffer& addresses,
         bool checksum, int threads) {
        auto [at, end] = numbers(forms);
        auto [address, last] = numbers(addresses);
        std::vector<pyrlk::Whole> wholes;
        std::vector<pyrlk::Part> parts;
        parts.reserve(static_cast<std::size_t>(last - address));
        while (at != end) {
          const std::int64_t ndim = end - at < 4 ? 0 : at[2], count = end - at < 4 ? -1 : at[3];
          if (ndim < 1 || ndim > pyrlk::kMaxDims || count < 0 || count > last - address ||
              end - at < 4 + ndim * (1 + 3 * count)) {
            throw py::value_error("a whole has offset, itemsize, ndim (1 to 16), parts, sizes");
          }
          pyrlk::Whole whole{};
          whole.offset = static_cast<std::uint64_t>(at[0]);
          whole.itemsize = static_cast<std::int32_t>(at[1]);
          whole.ndim = static_cast<std::int32_t>(ndim);
          whole.parts = static_cast<std::size_t>(count);
          std::copy_n(at + 4, ndim, whole.sizes);
          at += 4 + ndim;
          wholes.push_back(whole);
          for (std::int64_t p = 0; p < count; ++p, at += 3 * ndim) {
            pyrlk::Part part{};
            part.data = pointer(static_cast<Address>(*address++));
            std::copy_n(at, ndim, part.starts);
            std::copy_n(at + ndim, ndim, part.sizes);
            std::copy_n(at + 2 * ndim, ndim, part.strides);
            parts.push_back(part);
          }
        }
        if (address != last) throw py::value_error("more addresses than parts");
        Sums sums(checksum ? wholes.size() : 0);
        const py::gil_scoped_release nogil;
        pyrlk::assemble(pointer(buffer), bytes, wholes.data(), wholes.size(), parts.data(),
                        parts.size(), threads, checksum ? sums.data() : nullptr);
        return sums;
      },
      py::arg("buffer"), py::arg("buffer_bytes"), py::arg("forms"), py::arg("addresses"),
      py::arg("checksum"), py::arg("threads"));
  module.def(
      "checksum",
      [](Address buffer, std::uint64_t bytes, const py::buffer& items, int threads) {
        auto [at, end] = numbers(items);
        if ((end - at) % 2 != 0) throw py::value_error("ranges are pairs of offset and bytes");
        std::vector<pyrlk::Range> ranges;
        for (; at != end; at += 2) {
          ranges.push_back({static_cast<std::uint64_t>(at[0]), static_cast<std::uint64_t>(at[1])});
        }
        Sums sums(ranges.size());
        const py::gil_scoped_release nogil;
        pyrlk::checksum(pointer(buffer), bytes, ranges.data(), ranges.size(), threads, sums.data());
        return sums;
      },
      py::arg("buffer"), py::arg("buffer_bytes"), py::arg("ranges"), py::arg("threads"));

  // std::system_error arrives as OSError with its errno.
  py::register_local_exception_translator([](std::exception_ptr raised) {
    try {
      if (raised) std::rethrow_exception(raised);
    } catch (const std::system_error& error) {
      const py::tuple args = py::make_tuple(error.code().value(), error.what());
      PyErr_SetObject(PyExc_OSError, args.ptr());
    }
  });
  module.def(
      "segment_create",
      [](std::uint64_t bytes, bool inherit) {
        pyrlk::Segment segment;
        {
          const py::gil_scoped_release nogil;
          segment = pyrlk::segment_create(bytes, inherit);
        }
        return py::make_tuple(segment.fd, reinterpret_cast<Address>(segment.address));
      },
      py::arg("bytes"), py::arg("inherit") = false);
  module.def(
      "segment_open",
      [](int fd, std::uint64_t bytes) {
        return reinterpret_cast<Address>(pyrlk::segment_open(fd, bytes));
      },
      py::arg("fd"), py::arg("bytes"), py::call_guard<py::gil_scoped_release>());
  module.def(
      "segment_close",
      [](Address address, std::uint64_t bytes) { pyrlk::segment_close(pointer(address), bytes); },
      py::arg("address"), py::arg("bytes"), py::call_guard<py::gil_scoped_release>());

  namespace cuda = pyrlk::cuda;
  static const auto to_bytes = [](const auto& array) {
    return py::bytes(reinterpret_cast<const char*>(array.data()), array.size());
  };
  static const auto fill = [](auto& array, const std::string& bytes, const char* what) {
    if (bytes.size() != array.size()) {
      throw py::value_error(std::string(what) + " must have " + std::to_string(array.size()) +
                            " bytes, got " + std::to_string(bytes.size()));
    }
    std::memcpy(array.data(), bytes.data(), bytes.size());
  };
  py::register_local_exception<cuda::CudaError>(module, "CudaError", PyExc_RuntimeError);
  module.def("cuda_unavailable", &cuda::unavailable);
  module.def("cuda_device_count", &cuda::device_count);
  module.def(
      "cuda_device_uuid", [](int device) { return to_bytes(cuda::device_uuid(device)); },
      py::arg("device"));
  module.def(
      "cuda_device_by_uuid",
      [](const py::bytes& bytes) {
        cuda::Uuid uuid;
        fill(uuid, bytes, "uuid");
        return cuda::device_by_uuid(uuid);
      },
      py::arg("uuid"));
  module.def("cuda_alloc", &cuda::alloc, py::arg("device"), py::arg("bytes"),
             py::call_guard<py::gil_scoped_release>());
  module.def("cuda_free", &cuda::free, py::arg("device"), py::arg("address"),
             py::call_guard<py::gil_scoped_release>());
  module.def(
      "cuda_ipc_export",
      [](int device, Address address) {
        const cuda::Export out = cuda::ipc_export(device, address);
        return py::make_tuple(to_bytes(out.handle), out.offset, out.bytes);
      },
      py::arg("device"), py::arg("address"));
  module.def(
      "cuda_ipc_open",
      [](int device, const py::bytes& bytes) {
        cuda::Handle handle;
        fill(handle, bytes, "handle");
        const py::gil_scoped_release nogil;
        return cuda::ipc_open(device, handle);
      },
      py::arg("device"), py::arg("handle"));
  module.def("cuda_ipc_close", &cuda::ipc_close, py::arg("device"), py::arg("base"),
             py::call_guard<py::gil_scoped_release>());
  module.def(
      "cuda_copy_to_host",
      [](int device, Address dst, Address src, std::uint64_t bytes) {
        cuda::copy_to_host(device, pointer(dst), src, bytes);
      },
      py::arg("device"), py::arg("dst"), py::arg("src"), py::arg("bytes"),
      py::call_guard<py::gil_scoped_release>());
  module.def(
      "cuda_copy_to_device",
      [](int device, Address dst, Address src, std::uint64_t bytes) {
        cuda::copy_to_device(device, dst, pointer(src), bytes);
      },
      py::arg("device"), py::arg("dst"), py::arg("src"), py::arg("bytes"),
      py::call_guard<py::gil_scoped_release>());
  module.def("cuda_synchronize", &cuda::synchronize, py::arg("device"),
             py::call_guard<py::gil_scoped_release>());
}

// The copies of one bucket of a load plan, parsed once and run at every update.
class Replay {
 public:
  // dense: of each copy address, offset, itemsize, ndim, sizes, strides of the destination.
  // strided: of each copy address, offset, itemsize, from, to, ndim, sizes, source strides,
  // destination strides.
  Replay(const py::buffer& dense, const py::buffer& strided) {
    Reader in(dense);
    while (in.more()) {
      pyrlk::Piece piece{};
      piece.data = in.address();
      piece.offset = static_cast<std::uint64_t>(in.next());
      piece.itemsize = static_cast<std::int32_t>(in.next());
      piece.ndim = in.ndim();
      in.fill(piece.sizes, piece.ndim);
      in.fill(piece.strides, piece.ndim);
      dense_.push_back(piece);
    }
    Reader rest(strided);
    while (rest.more()) {
      pyrlk::Scatter copy{};
      copy.dst = rest.address();
      copy.src_offset = static_cast<std::uint64_t>(rest.next());
      copy.itemsize = static_cast<std::int32_t>(rest.next());
      copy.from = static_cast<pyrlk::Format>(rest.next());
      copy.to = static_cast<pyrlk::Format>(rest.next());
      copy.ndim = rest.ndim();
      rest.fill(copy.sizes, copy.ndim);
      rest.fill(copy.src_strides, copy.ndim);
      rest.fill(copy.dst_strides, copy.ndim);
      strided_.push_back(copy);
    }
  }

  // Sums of the dense copies as they went in, or none.
  std::vector<std::uint64_t> run(std::uint64_t buffer, std::uint64_t bytes, bool checksum,
                                 int threads) const {
    std::vector<std::uint64_t> sums(checksum ? dense_.size() : 0);
    const py::gil_scoped_release nogil;
    const auto* source = reinterpret_cast<const void*>(buffer);
    pyrlk::unpack(source, bytes, dense_.data(), dense_.size(), threads,
                  checksum ? sums.data() : nullptr);
    pyrlk::scatter(source, bytes, strided_.data(), strided_.size(), threads);
    return sums;
  }

 private:
  class Reader {
   public:
    explicit Reader(const py::buffer& buffer) : info_(buffer.request()) {
      if (info_.itemsize != 8 || info_.ndim != 1) throw py::value_error("wanted an array('Q')");
      at_ = static_cast<const std::int64_t*>(info_.ptr);
      end_ = at_ + info_.size;
    }
    bool more() const { return at_ != end_; }
    std::int64_t next() {
      if (at_ == end_) throw py::value_error("a copy is cut short");
      return *at_++;
    }
    void* address() { return reinterpret_cast<void*>(next()); }
    std::int32_t ndim() {
      const std::int64_t value = next();
      if (value < 0 || value > pyrlk::kMaxDims) throw py::value_error("ndim must be 0 to 16");
      return static_cast<std::int32_t>(value);
    }
    void fill(std::int64_t* to, std::int32_t count) {
      for (std::int32_t i = 0; i < count; ++i) to[i] = next();
    }

   private:
    py::buffer_info info_;
    const std::int64_t* at_;
    const std::int64_t* end_;
  };

  std::vector<pyrlk::Piece> dense_;
  std::vector<pyrlk::Scatter> strided_;
};

void bind_replay(py::module_& module) {
  py::class_<Replay>(module, "Replay")
      .def(py::init<const py::buffer&, const py::buffer&>(), py::arg("dense"), py::arg("strided"))
      .def("run", &Replay::run, py::arg("buffer"), py::arg("buffer_bytes"), py::arg("checksum"),
           py::arg("threads"));
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "CPU kernels and hand-over memory of pyrlk (raw pointers; see pyrlk/_C.pyi)";
  bind_kernels(module);
  bind_warm_pages(module);
  bind_memory(module);
  bind_replay(module);
}
