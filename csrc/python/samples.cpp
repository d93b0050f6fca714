// Binds what reads the samples of a batch (tensors, arrays, lists of numbers) and what becomes of
// them: a stack, a padded or packed batch, normalised images.
//
// Objects are read with the GIL and kept alive; bytes are moved without it.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <optional>

#include "collate/normalize_task.h"
#include "collate/pad_task.h"
#include "collate/stack_task.h"
#include "python/prefetch.h"
#include "python/reader.h"
#include "python/run.h"

namespace py = pybind11;

namespace batchops::collate {
namespace {

// Looks ahead of the sample that is being read, one pointer further the nearer it is.
template <class Items>
void look_ahead(const Items& items, Py_ssize_t i) {
  constexpr Py_ssize_t kStep = 4;
  const auto is_tensor = [&](Py_ssize_t k) {
    return k < items.size() && Py_TYPE(items[k]) == reader.tensor_type;
  };
  if (i + 3 * kStep < items.size()) __builtin_prefetch(items[i + 3 * kStep]);
  if (is_tensor(i + 2 * kStep)) reader.prefetch_tensor(items[i + 2 * kStep]);
  if (is_tensor(i + kStep)) reader.prefetch_storage(items[i + kStep]);
}

// A list or a tuple, whose items nobody replaces while they are read.
class Items {
 public:
  explicit Items(const py::object& batch) {
    if (PyList_CheckExact(batch.ptr())) {
      items_ = py::reinterpret_steal<py::tuple>(PyList_AsTuple(batch.ptr()));
    } else if (PyTuple_CheckExact(batch.ptr())) {
      items_ = py::reinterpret_borrow<py::tuple>(batch);
    }
  }
  bool readable() const { return items_.ptr() != nullptr; }
  Py_ssize_t size() const { return PyTuple_GET_SIZE(items_.ptr()); }
  PyObject* operator[](Py_ssize_t i) const { return PyTuple_GET_ITEM(items_.ptr(), i); }
  py::tuple keep() const { return items_; }

 private:
  py::tuple items_ = py::reinterpret_steal<py::tuple>(nullptr);
};

// The mmap that the memory of an array belongs to; null for all other memory. `base` is the
// array's: a chain of arrays down to what owns the memory, which a buffer may stand before.
PyObject* mapping_of(PyObject* base) {
  PyTypeObject* const array_type = py::detail::npy_api::get().PyArray_Type_;
  while (base != nullptr && PyObject_TypeCheck(base, array_type)) {
    base = py::detail::array_proxy(base)->base;
  }
  if (base == nullptr) return nullptr;
  if (PyMemoryView_Check(base)) base = PyMemoryView_GET_BUFFER(base)->obj;
  const bool maps = base != nullptr && std::strcmp(Py_TYPE(base)->tp_name, "mmap.mmap") == 0;
  return maps ? base : nullptr;
}

// torch.stack lays four dimensions and more out as the samples are; those are for it to do.
bool keeps_layout(int64_t dim, bool dense) { return dim < 4 || dense; }

class Samples {
 public:
  Samples() : blocks_(std::make_shared<Blocks>()) {}

  static std::optional<Samples> of_tensors(const py::object& batch, bool ragged) {
    const Items items(batch);
    if (reader.read == nullptr || !items.readable() || items.size() == 0) return std::nullopt;
    Samples samples;
    Blocks& blocks = *samples.blocks_;
    blocks.data.reserve(static_cast<size_t>(items.size()));
    blocks.bytes.reserve(static_cast<size_t>(items.size()));
    std::vector<int64_t> strides;
    int32_t dtype = -1;
    for (Py_ssize_t i = 0; i < items.size(); ++i) {
      TensorView view;
      look_ahead(items, i);
      if (Py_TYPE(items[i]) != reader.tensor_type || !reader.read(items[i], &view)) {
        return std::nullopt;
      }
      if (i == 0) {
        dtype = view.dtype;
        blocks.item_bytes = view.item_bytes;
      }
      if (view.dtype != dtype) return std::nullopt;
      strides.assign(view.strides, view.strides + view.dim);
      for (int64_t& stride : strides) stride *= view.item_bytes;
      if (!samples.add(view.data, view.sizes, strides.data(), view.dim, ragged)) {
        return std::nullopt;
      }
    }
    return samples.finished(items, ragged);
  }

  static std::optional<Samples> of_arrays(const py::object& batch, bool ragged) {
    const Items items(batch);
    if (!items.readable() || items.size() == 0) return std::nullopt;
    PyTypeObject* const array_type = py::detail::npy_api::get().PyArray_Type_;
    Samples samples;
    Blocks& blocks = *samples.blocks_;
    int type_num = -1;
    PyObject* last_base = nullptr;
    PyObject* last_mapping = nullptr;
    for (Py_ssize_t i = 0; i < items.size(); ++i) {
      PyTypeObject* const type = Py_TYPE(items[i]);
      if (type != array_type && type != reader.memmap_type) return std::nullopt;
      const auto* array = py::detail::array_proxy(items[i]);
      const auto* descr = py::detail::array_descriptor1_proxy(array->descr);
      if (i == 0) {
        type_num = descr->type_num;
        blocks.item_bytes = py::reinterpret_borrow<py::array>(items[i]).itemsize();
        if (std::strchr("biufc", descr->kind) == nullptr) return std::nullopt;
      }
      if (descr->type_num != type_num || (descr->byteorder != '=' && descr->byteorder != '|')) {
        return std::nullopt;
      }
      int64_t sizes[NPY_MAX_DIMS];
      int64_t strides[NPY_MAX_DIMS];
      for (int d = 0; d < array->nd; ++d) {
        sizes[d] = array->dimensions[d];
        strides[d] = array->strides[d];
        // torch refuses these; so let it.
        if (strides[d] < 0 || strides[d] % blocks.item_bytes != 0) return std::nullopt;
      }
      if (array->base != last_base) {  // most are views of one array, or own their memory
        last_base = array->base;
        PyObject* const mapping = mapping_of(last_base);
        if (mapping != nullptr && mapping != last_mapping) samples.mapped_.push_back(i);
        last_mapping = mapping;
      }
      if ((array->flags & kWriteable) == 0 && samples.readonly_ < 0) samples.readonly_ = i;
      if (!samples.add(array->data, sizes, strides, array->nd, ragged)) return std::nullopt;
    }
    return samples.finished(items, ragged);
  }

  // Lists of int to int64, of float (and int) to fp32.
  static std::optional<Samples> of_lists(const py::object& batch) {
    const Items items(batch);
    if (!items.readable() || items.size() == 0) return std::nullopt;
    int64_t total = 0;
    bool floats = false;
    for (Py_ssize_t i = 0; i < items.size(); ++i) {
      if (!PyList_CheckExact(items[i]) && !PyTuple_CheckExact(items[i])) return std::nullopt;
      const Py_ssize_t n = PySequence_Fast_GET_SIZE(items[i]);
      total += n;
      PyObject** const numbers = PySequence_Fast_ITEMS(items[i]);
      for (Py_ssize_t k = 0; k < n; ++k) {
        if (PyLong_CheckExact(numbers[k])) continue;
        if (!PyFloat_CheckExact(numbers[k])) return std::nullopt;
        floats = true;
      }
    }
    Samples samples;
    samples.floats_ = floats;
    samples.blocks_->item_bytes = floats ? 4 : 8;
    auto owned = std::make_shared<std::vector<std::byte>>(
        static_cast<size_t>(total * samples.blocks_->item_bytes + 1));
    std::byte* out = owned->data();
    for (Py_ssize_t i = 0; i < items.size(); ++i) {
      const int64_t n = PySequence_Fast_GET_SIZE(items[i]);
      const bool read = floats ? read_floats(items[i], out) : read_ints(items[i], out);
      if (!read) return std::nullopt;
      const int64_t stride = samples.blocks_->item_bytes;
      samples.add(out, &n, &stride, 1, true);
      out += n * stride;
    }
    samples.owned_ = std::move(owned);
    return samples;
  }

  int64_t count() const { return blocks_->count(); }
  int64_t item_bytes() const { return blocks_->item_bytes; }
  int64_t readonly() const { return readonly_; }
  const std::vector<int64_t>& mapped() const { return mapped_; }
  bool in_plain_memory() const { return readonly_ < 0 && mapped_.empty(); }
  bool floats() const { return floats_; }
  bool dense() const { return blocks_->dense(); }
  const std::vector<int64_t>& sizes() const { return blocks_->sizes; }
  int64_t total_bytes() const { return blocks_->total_bytes(); }

  std::vector<int64_t> lengths() const {
    std::vector<int64_t> lengths;
    const int64_t step = std::max<int64_t>(blocks_->step_bytes(), 1);
    for (const int64_t bytes : blocks_->bytes) lengths.push_back(bytes / step);
    return lengths;
  }
  int64_t longest() const {
    return blocks_->longest_bytes() / std::max<int64_t>(blocks_->step_bytes(), 1);
  }
  int64_t total() const {
    return blocks_->total_bytes() / std::max<int64_t>(blocks_->step_bytes(), 1);
  }

  void copy_to(uintptr_t address, int64_t bytes, int threads) const {
    std::byte* const out = output("stack", address, bytes, blocks_->total_bytes());
    run_now(StackTask::make(blocks_, out, threads), threads);
  }

  void pad_to(int64_t width, bool left, const py::bytes& fill, const py::bytes& label_fill,
              uintptr_t values, uintptr_t labels, uintptr_t mask, int mask_bytes,
              uintptr_t positions, uintptr_t lengths, int threads) const {
    if (width < longest()) {
      throw py::value_error("pad: width: expected at least " + std::to_string(longest()) +
                            ", got " + std::to_string(width));
    }
    PadOutputs out;
    out.values = reinterpret_cast<std::byte*>(values);
    out.labels = reinterpret_cast<std::byte*>(labels);
    out.mask = reinterpret_cast<std::byte*>(mask);
    out.mask_bytes = mask_bytes;
    out.positions = reinterpret_cast<int64_t*>(positions);
    out.lengths = reinterpret_cast<int64_t*>(lengths);
    run_now(PadTask::make(blocks_, out, width, left, item(fill), item(label_fill), threads),
            threads);
  }

  void pack_to(uintptr_t values, uintptr_t labels, uintptr_t positions, uintptr_t sequence,
               uintptr_t offsets, const py::bytes& separator, int threads) const {
    PackOutputs out;
    out.values = reinterpret_cast<std::byte*>(values);
    out.labels = reinterpret_cast<std::byte*>(labels);
    out.positions = reinterpret_cast<int64_t*>(positions);
    out.sequence = reinterpret_cast<int32_t*>(sequence);
    out.offsets = reinterpret_cast<int32_t*>(offsets);
    run_now(PackTask::make(blocks_, out, item(separator), threads), threads);
  }

  void normalize_to(uintptr_t address, int64_t bytes, int64_t channels, bool last_in, bool last_out,
                    const std::string& type, std::vector<float> scale, std::vector<float> shift,
                    int threads) const {
    Pixels pixels;
    pixels.channels = channels;
    pixels.channels_last_in = last_in;
    pixels.channels_last_out = last_out;
    pixels.scale = std::move(scale);
    pixels.shift = std::move(shift);
    if (type == "float32") {
      pixels.type = FloatType::fp32;
    } else if (type == "bfloat16") {
      pixels.type = FloatType::bf16;
    } else if (type == "float16") {
      pixels.type = FloatType::fp16;
    } else {
      throw py::value_error("normalize: type: expected float32, bfloat16 or float16, got " + type);
    }
    const int64_t items = blocks_->bytes.empty() ? 0 : blocks_->bytes[0];
    const auto expected = static_cast<size_t>(channels);
    if (blocks_->item_bytes != 1 || !blocks_->dense() || channels <= 0 || items % channels != 0 ||
        pixels.scale.size() != expected || pixels.shift.size() != expected) {
      throw py::value_error(
          "normalize: expected dense uint8 samples of a multiple of " + std::to_string(channels) +
          " channels and as many scales and shifts, got " + std::to_string(items) + " items of " +
          std::to_string(blocks_->item_bytes) + " bytes, " + std::to_string(pixels.scale.size()) +
          " and " + std::to_string(pixels.shift.size()));
    }
    pixels.pixels = items / channels;
    const int64_t item_bytes = pixels.type == FloatType::fp32 ? 4 : 2;
    std::byte* const out = output("normalize", address, bytes, blocks_->total_bytes() * item_bytes);
    run_now(NormalizeTask::make(blocks_, std::move(pixels), out, threads), threads);
  }

 private:
  bool add(const void* data, const int64_t* sizes, const int64_t* strides, int64_t dim,
           bool ragged) {
    if (ragged && dim < 1) return false;
    if (blocks_->add(data, sizes, strides, dim, ragged) != Blocks::Added::ok) return false;
    const bool dense = blocks_->strided.empty() || blocks_->strided.back().dense();
    return ragged || keeps_layout(dim, dense);
  }

  std::optional<Samples> finished(const Items& items, bool ragged) {
    if (!ragged && blocks_->bytes[0] == 0) return std::nullopt;
    keep_ = items.keep();
    return std::move(*this);
  }

  static bool read_ints(PyObject* list, std::byte* out) {
    PyObject** const numbers = PySequence_Fast_ITEMS(list);
    for (Py_ssize_t k = 0; k < PySequence_Fast_GET_SIZE(list); ++k, out += 8) {
      int overflow = 0;
      const int64_t value = PyLong_AsLongLongAndOverflow(numbers[k], &overflow);
      if (overflow != 0) return false;
      std::memcpy(out, &value, 8);
    }
    return true;
  }

  static bool read_floats(PyObject* list, std::byte* out) {
    PyObject** const numbers = PySequence_Fast_ITEMS(list);
    for (Py_ssize_t k = 0; k < PySequence_Fast_GET_SIZE(list); ++k, out += 4) {
      const double value = PyFloat_AsDouble(numbers[k]);
      if (value == -1.0 && PyErr_Occurred() != nullptr) {
        PyErr_Clear();
        return false;
      }
      const auto narrow = static_cast<float>(value);
      std::memcpy(out, &narrow, 4);
    }
    return true;
  }

  Item item(const py::bytes& bytes) const {
    const std::string_view view(bytes);
    if (static_cast<int64_t>(view.size()) != blocks_->item_bytes) {
      throw py::value_error("pad: value: expected " + std::to_string(blocks_->item_bytes) +
                            " bytes, got " + std::to_string(view.size()));
    }
    Item item{};
    std::memcpy(item.data(), view.data(), view.size());
    return item;
  }

  static constexpr int NPY_MAX_DIMS = 64;

  std::shared_ptr<Blocks> blocks_;
  py::object keep_ = py::none();
  std::shared_ptr<std::vector<std::byte>> owned_;
  int64_t readonly_ = -1;
  std::vector<int64_t> mapped_;
  bool floats_ = false;
};

// Python numbers to one vector. Nothing but the exact types: torch decides about mixtures.
template <class T, class Read>
bool write_numbers(const py::object& batch, uintptr_t address, int64_t bytes, Read read) {
  const Items items(batch);
  if (!items.readable()) return false;
  std::byte* out = output("numbers", address, bytes,
                          static_cast<int64_t>(items.size() * static_cast<Py_ssize_t>(sizeof(T))));
  for (Py_ssize_t i = 0; i < items.size(); ++i, out += sizeof(T)) {
    T value;
    if (!read(items[i], &value)) return false;
    std::memcpy(out, &value, sizeof(T));
  }
  return true;
}

// tuple(sample[key] for sample in batch) where that runs no code of the samples' own; None where it
// might, or where a key is missing.
py::object column(const py::object& batch, const py::object& key) {
  const Items items(batch);
  if (!items.readable() || !PyUnicode_CheckExact(key.ptr())) return py::none();
  auto out = py::reinterpret_steal<py::tuple>(PyTuple_New(items.size()));
  const auto find = [&](Py_ssize_t i) {
    PyObject* const value =
        PyDict_CheckExact(items[i]) ? PyDict_GetItemWithError(items[i], key.ptr()) : nullptr;
    if (value == nullptr) PyErr_Clear();
    return value;
  };
  constexpr Py_ssize_t kStep = 4;
  for (Py_ssize_t i = 0; i < items.size(); ++i) {
    if (i + 3 * kStep < items.size()) prefetch_dict(items[i + 3 * kStep]);
    if (i + 2 * kStep < items.size()) prefetch_keys(items[i + 2 * kStep]);
    if (i + kStep < items.size()) prefetch(find(i + kStep));  // a reference is counted in there
    PyObject* const value = find(i);
    if (value == nullptr) return py::none();
    PyTuple_SET_ITEM(out.ptr(), i, Py_NewRef(value));
  }
  return out;
}

}  // namespace
}  // namespace batchops::collate

void bind_samples(py::module_& m) {
  using namespace batchops::collate;

  py::class_<Samples>(m, "Samples", "The samples of a batch where they lie, kept alive")
      .def_static(
          "of_tensors", &Samples::of_tensors, py::arg("batch"), py::arg("ragged") = false,
          "None where torch has to do it: anything but plain tensors of one dtype and shape "
          "in host memory")
      .def_static("of_arrays", &Samples::of_arrays, py::arg("batch"), py::arg("ragged") = false)
      .def_static("of_lists", &Samples::of_lists, py::arg("batch"))
      .def("__len__", &Samples::count)
      .def_property_readonly("item_bytes", &Samples::item_bytes)
      .def_property_readonly("total_bytes", &Samples::total_bytes)
      .def_property_readonly("sizes", &Samples::sizes, "Of the first sample")
      .def_property_readonly("lengths", &Samples::lengths, "Of the first dimension")
      .def_property_readonly("longest", &Samples::longest)
      .def_property_readonly("total", &Samples::total, "Sum of the lengths")
      .def_property_readonly("readonly", &Samples::readonly, "The first array that is, or -1")
      .def_property_readonly("in_plain_memory", &Samples::in_plain_memory,
                             "No array is read-only, or mapped")
      .def_property_readonly("mapped", &Samples::mapped,
                             "Where in the batch arrays begin to lie in another mmap")
      .def_property_readonly("floats", &Samples::floats, "Lists: fp32 rather than int64")
      .def_property_readonly("dense", &Samples::dense)
      .def("copy_to", &Samples::copy_to, py::arg("address"), py::arg("bytes"), py::arg("threads"),
           "Samples end to end; releases the GIL for large batches")
      .def("pad_to", &Samples::pad_to, py::arg("width"), py::arg("left"), py::arg("fill"),
           py::arg("label_fill"), py::arg("values"), py::arg("labels") = 0, py::arg("mask") = 0,
           py::arg("mask_bytes") = 8, py::arg("positions") = 0, py::arg("lengths") = 0,
           py::arg("threads") = 0)
      .def("pack_to", &Samples::pack_to, py::arg("values"), py::arg("labels"), py::arg("positions"),
           py::arg("sequence"), py::arg("offsets"), py::arg("separator"), py::arg("threads") = 0)
      .def("normalize_to", &Samples::normalize_to, py::arg("address"), py::arg("bytes"),
           py::arg("channels"), py::arg("channels_last_in"), py::arg("channels_last_out"),
           py::arg("type"), py::arg("scale"), py::arg("shift"), py::arg("threads"));

  m.def(
      "read_tensors_by",
      [](const py::object& type, uintptr_t read, uintptr_t count_writes, uintptr_t prefetch_tensor,
         uintptr_t prefetch_storage, uintptr_t let_grow, uintptr_t run_on_team,
         const py::object& memmap) {
        reader.tensor_type = reinterpret_cast<PyTypeObject*>(type.inc_ref().ptr());
        reader.memmap_type = reinterpret_cast<PyTypeObject*>(memmap.inc_ref().ptr());
        reader.count_writes = reinterpret_cast<CountWrites>(count_writes);
        reader.prefetch_tensor = reinterpret_cast<PrefetchTensor>(prefetch_tensor);
        reader.prefetch_storage = reinterpret_cast<PrefetchTensor>(prefetch_storage);
        reader.let_grow = reinterpret_cast<LetGrow>(let_grow);
        reader.read = reinterpret_cast<ReadTensor>(read);
        team = {reinterpret_cast<RunOnTeam>(run_on_team), getpid(), pthread_self()};
      },
      py::arg("tensor_type"), py::arg("read"), py::arg("count_writes"), py::arg("prefetch_tensor"),
      py::arg("prefetch_storage"), py::arg("let_grow"), py::arg("run_on_team"),
      py::arg("memmap_type"));

  m.def("let_grow", [](const py::object& tensor) { reader.let_grow(tensor.ptr()); });

  m.def("column", &column, py::arg("batch"), py::arg("key"),
        "tuple(sample[key] for sample in batch) for plain dicts, or None");
  m.def("write_floats", [](const py::object& batch, uintptr_t address, int64_t bytes) {
    return write_numbers<double>(batch, address, bytes, [](PyObject* item, double* value) {
      if (!PyFloat_CheckExact(item)) return false;
      *value = PyFloat_AS_DOUBLE(item);
      return true;
    });
  });
  m.def("write_ints", [](const py::object& batch, uintptr_t address, int64_t bytes) {
    return write_numbers<int64_t>(batch, address, bytes, [](PyObject* item, int64_t* value) {
      if (!PyLong_CheckExact(item)) return false;
      int overflow = 0;
      *value = PyLong_AsLongLongAndOverflow(item, &overflow);
      return overflow == 0;
    });
  });
}
