// Binds csrc/collate: Table (what to read), Rows (which rows), GatherJob (a batch on its way).
//
// Addresses come from batchops.data, which keeps the tensors alive and checks their layout. Rows
// are checked against the table, and outputs against the rows, before anything is written.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <vector>

#include "collate/gather_task.h"
#include "collate/joined_task.h"
#include "collate/stack_task.h"
#include "python/run.h"

namespace py = pybind11;

namespace batchops::collate {
namespace {

// A run of int64 indices in memory that the caller keeps alive while it passes this on.
struct IndexSpan {
  const int64_t* data;
  int64_t size;
};

// Reads indices out of what samplers yield. Only types whose items are plain integers and whose
// iteration runs no Python code are readable; the caller does the others as Python would.
class IndexReader {
 public:
  explicit IndexReader(PyObject* source) {
    if (PyList_CheckExact(source) || PyTuple_CheckExact(source)) {
      kind_ = Kind::objects;
      size_ = PySequence_Fast_GET_SIZE(source);
      objects_ = PySequence_Fast_ITEMS(source);
    } else if (PyRange_Check(source) && Py_TYPE(source) == &PyRange_Type) {
      read_range(source);
    } else if (py::isinstance<IndexSpan>(source)) {
      const auto& span = py::handle(source).cast<const IndexSpan&>();
      kind_ = Kind::strided;
      data_ = reinterpret_cast<const char*>(span.data);
      stride_ = sizeof(int64_t);
      size_ = span.size;
    } else if (std::strcmp(Py_TYPE(source)->tp_name, "numpy.ndarray") == 0) {
      read_buffer(source);
    }
  }
  ~IndexReader() {
    if (view_.obj != nullptr) PyBuffer_Release(&view_);
  }
  IndexReader(const IndexReader&) = delete;
  IndexReader& operator=(const IndexReader&) = delete;

  bool readable() const { return kind_ != Kind::none; }
  int64_t size() const { return size_; }

  // 0 <= i < size(). False where the item is no plain int64.
  bool at(int64_t i, int64_t* index) const {
    switch (kind_) {
      case Kind::range:
        *index = start_ + i * step_;
        return true;
      case Kind::strided:
        std::memcpy(index, data_ + i * stride_, sizeof(*index));
        return true;
      case Kind::objects: {
        PyObject* item = objects_[i];
        // A bool is none: torch masks with it.
        if (!PyLong_CheckExact(item)) return at_numpy_scalar(item, index);
        int overflow = 0;
        *index = PyLong_AsLongLongAndOverflow(item, &overflow);
        return overflow == 0;
      }
      default:
        return false;
    }
  }

 private:
  enum class Kind { none, objects, range, strided };

  static bool at_numpy_scalar(PyObject* item, int64_t* index) {
    const char* type = Py_TYPE(item)->tp_name;
    if (std::strcmp(type, "numpy.int64") != 0 && std::strcmp(type, "numpy.int32") != 0) {
      return false;
    }
    *index = PyNumber_AsSsize_t(item, nullptr);
    if (*index != -1 || PyErr_Occurred() == nullptr) return true;
    PyErr_Clear();
    return false;
  }

  void read_range(PyObject* source) {
    const auto field = [&](const char* name, int64_t* value) {
      const py::object object = py::handle(source).attr(name);
      int overflow = 0;
      *value = PyLong_AsLongLongAndOverflow(object.ptr(), &overflow);
      return overflow == 0;
    };
    int64_t stop = 0;
    const Py_ssize_t size = PyObject_Size(source);
    if (size < 0) {
      PyErr_Clear();
      return;
    }
    if (!field("start", &start_) || !field("step", &step_) || !field("stop", &stop)) return;
    kind_ = Kind::range;
    size_ = size;
  }

  void read_buffer(PyObject* source) {
    if (PyObject_GetBuffer(source, &view_, PyBUF_FORMAT | PyBUF_STRIDES) != 0) {
      PyErr_Clear();
      view_.obj = nullptr;
      return;
    }
    const bool is_int64 =
        view_.itemsize == 8 && view_.format != nullptr &&
        (std::strcmp(view_.format, "l") == 0 || std::strcmp(view_.format, "q") == 0);
    if (view_.ndim != 1 || !is_int64) return;
    kind_ = Kind::strided;
    data_ = static_cast<const char*>(view_.buf);
    stride_ = view_.strides[0];
    size_ = view_.shape[0];
  }

  Kind kind_ = Kind::none;
  int64_t size_ = 0;
  PyObject** objects_ = nullptr;
  int64_t start_ = 0;
  int64_t step_ = 1;
  const char* data_ = nullptr;
  int64_t stride_ = 0;
  Py_buffer view_{};
};

struct Rows {
  std::shared_ptr<const std::vector<int64_t>> indices;
};

// `exact`: indices into the last of the lookups do not count from its end.
std::optional<Rows> resolve(const py::object& indices, const py::tuple& lookups, bool exact,
                            int64_t size) {
  const IndexReader reader(indices.ptr());
  if (!reader.readable()) return std::nullopt;
  auto resolved = std::make_shared<std::vector<int64_t>>(static_cast<size_t>(reader.size()));
  std::vector<int64_t>& rows = *resolved;
  for (size_t i = 0; i < rows.size(); ++i) {
    if (!reader.at(static_cast<int64_t>(i), &rows[i])) return std::nullopt;
  }
  size_t left = lookups.size();
  for (const py::handle item : lookups) {
    const IndexReader lookup(item.ptr());
    if (--left == 0 && exact &&
        std::any_of(rows.begin(), rows.end(), [](int64_t row) { return row < 0; })) {
      return std::nullopt;
    }
    if (!lookup.readable() || !normalize(rows, lookup.size())) return std::nullopt;
    for (int64_t& row : rows) {
      if (!lookup.at(row, &row)) return std::nullopt;
    }
  }
  if (!normalize(rows, size)) return std::nullopt;
  return Rows{std::move(resolved)};
}

class GatherJob {
 public:
  GatherJob(std::shared_ptr<Task> task, py::object keep, int threads)
      : task_(std::move(task)), keep_(std::move(keep)) {
    if (is_small(*task_)) return;
    if (threads > 0) ThreadPool::instance().submit(task_);
  }
  // What `keep` holds may go only when no thread reads or writes it: a chunk or two at most.
  ~GatherJob() { ThreadPool::instance().cancel(*task_); }
  GatherJob(const GatherJob&) = delete;
  GatherJob& operator=(const GatherJob&) = delete;

  bool done() const { return task_->done(); }
  void wait() { wait_for(*task_); }

 private:
  const std::shared_ptr<Task> task_;
  py::object keep_;
};

// The check that nothing out of range is read or written: rows may come from another table.
void check(const Table& table, const Rows& rows, const py::sequence& outputs, int64_t size,
           std::vector<std::byte*>* out) {
  if (outputs.size() != table.size()) {
    throw py::value_error("gather: outputs: expected one for each of " +
                          std::to_string(table.size()) + " columns, got " +
                          std::to_string(outputs.size()));
  }
  const int64_t n = static_cast<int64_t>(rows.indices->size());
  out->reserve(table.size());
  for (size_t c = 0; c < table.size(); ++c) {
    const auto [address, bytes] = outputs[c].cast<std::pair<uintptr_t, int64_t>>();
    const Column& column = table[c];
    if (bytes != n * column.row_bytes || (address == 0 && bytes != 0)) {
      throw py::value_error("gather: output " + std::to_string(c) + ": expected " +
                            std::to_string(n * column.row_bytes) + " bytes (" + std::to_string(n) +
                            " rows of " + std::to_string(column.row_bytes) + "), got " +
                            std::to_string(bytes) + " at " + std::to_string(address));
    }
    out->push_back(reinterpret_cast<std::byte*>(address));
  }
  for (const int64_t row : *rows.indices) {
    if (static_cast<uint64_t>(row) >= static_cast<uint64_t>(size)) {
      throw py::index_error("gather: rows: expected in [0, " + std::to_string(size) + "), got " +
                            std::to_string(row));
    }
  }
}

class PyTable {
 public:
  PyTable(const py::sequence& columns, const std::vector<std::string>& casts) {
    auto table = std::make_shared<Table>();
    for (const py::handle item : columns) {
      const auto [address, rows, row_stride, item_bytes, sizes, strides] =
          item.cast<std::tuple<uintptr_t, int64_t, int64_t, int64_t, std::vector<int64_t>,
                               std::vector<int64_t>>>();
      table->push_back(Column::make(reinterpret_cast<const void*>(address), rows, row_stride,
                                    item_bytes, sizes, strides));
      if (table->back().rows != table->front().rows) {
        throw py::value_error("gather: columns: expected the same number of rows in each, got " +
                              std::to_string(table->front().rows) + " and " +
                              std::to_string(table->back().rows));
      }
    }
    if (table->empty()) throw py::value_error("gather: columns: expected at least one, got none");
    if (!casts.empty() && casts.size() != table->size()) {
      throw py::value_error("gather: casts: expected one for each of " +
                            std::to_string(table->size()) + " columns, got " +
                            std::to_string(casts.size()));
    }
    for (size_t c = 0; c < casts.size(); ++c) {
      if (!casts[c].empty()) (*table)[c].convert_items(casts[c]);
    }
    table_ = std::move(table);
  }

  int64_t rows() const { return table_->front().rows; }

  std::optional<Rows> resolve(const py::object& indices, const py::tuple& lookups,
                              bool exact) const {
    return batchops::collate::resolve(indices, lookups, exact, rows());
  }
  const std::shared_ptr<const Table>& table() const { return table_; }

  std::unique_ptr<GatherJob> gather(const Rows& rows, const py::sequence& outputs, py::object keep,
                                    int threads) const {
    std::vector<std::byte*> out;
    check(*table_, rows, outputs, this->rows(), &out);
    auto task = GatherTask::make(table_, rows.indices, std::move(out), threads);
    return std::make_unique<GatherJob>(std::move(task), std::move(keep), threads);
  }

 private:
  std::shared_ptr<const Table> table_;
};

// Tables of the same columns, one after the other.
class PyConcat {
 public:
  explicit PyConcat(std::vector<PyTable> tables) : tables_(std::move(tables)) {
    if (tables_.empty()) throw py::value_error("gather: tables: expected at least one, got none");
    for (const PyTable& table : tables_) {
      const Table& first = *tables_[0].table();
      const Table& other = *table.table();
      bool alike = first.size() == other.size();
      for (size_t c = 0; alike && c < first.size(); ++c) {
        alike =
            first[c].row_bytes == other[c].row_bytes && first[c].item_bytes == other[c].item_bytes;
      }
      if (!alike) throw py::value_error("gather: tables: expected the same columns in each");
      ends_.push_back((ends_.empty() ? 0 : ends_.back()) + table.rows());
    }
  }

  int64_t rows() const { return ends_.back(); }

  std::optional<Rows> resolve(const py::object& indices, const py::tuple& lookups,
                              bool exact) const {
    return batchops::collate::resolve(indices, lookups, exact, rows());
  }

  std::unique_ptr<GatherJob> gather(const Rows& rows, const py::sequence& outputs, py::object keep,
                                    int threads) const {
    std::vector<std::byte*> out;
    const Table& columns = *tables_[0].table();
    check(columns, rows, outputs, this->rows(), &out);
    std::vector<std::pair<size_t, int64_t>> places;
    for (const int64_t row : *rows.indices) {
      const auto part =
          static_cast<size_t>(std::upper_bound(ends_.begin(), ends_.end(), row) - ends_.begin());
      places.emplace_back(part, part > 0 ? row - ends_[part - 1] : row);
    }
    std::vector<std::shared_ptr<Task>> parts;
    for (size_t c = 0; c < columns.size(); ++c) {
      auto blocks = std::make_shared<Blocks>();
      for (const auto& [part, row] : places) blocks->add_row((*tables_[part].table())[c], row);
      parts.push_back(StackTask::make(std::move(blocks), out[c], threads));
    }
    auto task = JoinedTask::make(std::move(parts), threads);
    return std::make_unique<GatherJob>(std::move(task), std::move(keep), threads);
  }

 private:
  std::vector<PyTable> tables_;
  std::vector<int64_t> ends_;
};

}  // namespace
}  // namespace batchops::collate

void bind_collate(py::module_& m) {
  using namespace batchops::collate;

  py::class_<IndexSpan>(m, "IndexSpan", "int64 indices at an address, alive while this is passed")
      .def(py::init([](uintptr_t address, int64_t size) {
             if (size < 0 || (address == 0 && size > 0)) {
               throw py::value_error("IndexSpan: expected an address and a size >= 0, got " +
                                     std::to_string(address) + ", " + std::to_string(size));
             }
             return IndexSpan{reinterpret_cast<const int64_t*>(address), size};
           }),
           py::arg("address"), py::arg("size"));

  py::class_<Rows>(m, "Rows", "Row numbers of a table, checked")
      .def("__len__", [](const Rows& self) { return self.indices->size(); })
      .def(
          "__eq__", [](const Rows& a, const Rows& b) { return *a.indices == *b.indices; },
          py::is_operator());

  py::class_<GatherJob>(m, "GatherJob", "A batch being gathered by native threads")
      .def_property_readonly("done", &GatherJob::done)
      .def("wait", &GatherJob::wait,
           "Return when the batch is complete; releases the GIL for large ones");

  py::class_<PyTable>(m, "Table", "Columns (address, rows, row_stride, item_bytes, sizes, strides)")
      .def(py::init<const py::sequence&, const std::vector<std::string>&>(), py::arg("columns"),
           py::arg("casts") = std::vector<std::string>(),
           "casts: for each column \"\", or its items' type on the way, as \"int32 to int64\"")
      .def_property_readonly("rows", &PyTable::rows)
      .def("resolve", &PyTable::resolve, py::arg("indices"), py::arg("lookups") = py::tuple(),
           py::arg("exact") = false,
           "Rows for Python-style indices, taken through each of lookups (a Subset's indices) in "
           "turn; None where Python has to do it: out of range and, with `exact`, counted from the "
           "end of the last of the lookups")
      .def("gather", &PyTable::gather, py::arg("rows"), py::arg("outputs"), py::arg("keep"),
           py::arg("threads"),
           "Start filling outputs [(address, bytes)] in the background on at most `threads` pool "
           "threads; `keep` lives until no thread touches them");

  py::class_<PyConcat>(m, "Concat", "Tables one after the other")
      .def(py::init<std::vector<PyTable>>(), py::arg("tables"))
      .def_property_readonly("rows", &PyConcat::rows)
      .def("resolve", &PyConcat::resolve, py::arg("indices"), py::arg("lookups") = py::tuple(),
           py::arg("exact") = false)
      .def("gather", &PyConcat::gather, py::arg("rows"), py::arg("outputs"), py::arg("keep"),
           py::arg("threads"));

  m.def(
      "collate_threads", [] { return ThreadPool::instance().threads(); },
      "Native threads that are alive in this process");
  m.attr("COLLATE_BACKGROUND_BYTES") = py::int_(kBackgroundBytes);
  m.attr("COLLATE_MAX_THREADS") = py::int_(ThreadPool::kMaxThreads);
  m.def(
      "collate_shutdown", [] { ThreadPool::instance().shutdown(); },
      py::call_guard<py::gil_scoped_release>());
  py::module_::import("atexit").attr("register")(m.attr("collate_shutdown"));
}
