// The only file here that knows Python. Tensors arrive as addresses (tensor.data_ptr()) and sizes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace py = pybind11;

namespace {

// kernels/: row statistics, losses, sampling.
void bind_kernels(py::module_& module) { (void)module; }

// memory/: packing, shared memory, CUDA handles.
void bind_memory(py::module_& module) { (void)module; }

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "CPU kernels and hand-over memory of pyrlk (raw pointers; see pyrlk/_C.pyi)";
  bind_kernels(module);
  bind_memory(module);
}
