# The torch binding needs torch's headers and three of its libraries, and nothing else of it:
# find_package(Torch) would pull in CUDA checks and override the architectures.
if(NOT BATCHOPS_TORCH_ROOTS)
  find_package(Python REQUIRED COMPONENTS Interpreter)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c
      "import importlib.util as u, os; s = u.find_spec('torch'); print(os.path.dirname(s.origin) if s and s.origin else '', end='')"
    OUTPUT_VARIABLE BATCHOPS_TORCH_ROOTS)
  if(NOT BATCHOPS_TORCH_ROOTS)
    message(FATAL_ERROR
      "batchops: torch is not installed for ${Python_EXECUTABLE}, and batchops is built against "
      "it. Type:\n"
      "    ${Python_EXECUTABLE} -m pip install torch==2.13.0 scikit-build-core pybind11 ninja\n"
      "    ${Python_EXECUTABLE} -m pip install --no-build-isolation .\n"
      "(without --no-build-isolation pip hides the installed torch from the build)")
  endif()
endif()

function(batchops_torch_version root result)
  set(_header "${root}/include/torch/headeronly/version.h")
  if(NOT EXISTS "${_header}")
    message(FATAL_ERROR
      "batchops: '${root}' is no torch package of 2.11 or newer (expected ${_header}). "
      "BATCHOPS_TORCH_ROOTS lists folders such as .../site-packages/torch")
  endif()
  file(STRINGS "${_header}" _lines REGEX "define TORCH_VERSION_M(AJ|IN)OR ")
  string(REGEX REPLACE ".*MAJOR ([0-9]+).*MINOR ([0-9]+).*" "\\1.\\2" _version "${_lines}")
  if(_version VERSION_LESS 2.11)
    message(FATAL_ERROR "batchops: torch 2.11 or newer is needed, '${root}' is ${_version}. Type:\n"
                        "    pip install torch==2.13.0")
  endif()
  set(${result} "${_version}" PARENT_SCOPE)
endfunction()

foreach(root IN LISTS BATCHOPS_TORCH_ROOTS)
  batchops_torch_version("${root}" _version)
  message(STATUS "batchops: binding for torch ${_version} from ${root}")
endforeach()

function(batchops_add_torch_binding root result)
  batchops_torch_version("${root}" _version)
  string(REPLACE "." "_" _suffix "${_version}")
  set(_target _torch_${_suffix})
  add_library(${_target} MODULE ${BATCHOPS_TORCH_SOURCES})
  set_target_properties(${_target} PROPERTIES PREFIX "" BUILD_WITH_INSTALL_RPATH ON
    UNITY_BUILD ${BATCHOPS_UNITY} UNITY_BUILD_BATCH_SIZE 0)
  target_include_directories(${_target} PRIVATE csrc)
  target_include_directories(${_target} SYSTEM PRIVATE
    "${root}/include" "${root}/include/torch/csrc/api/include" ${Python_INCLUDE_DIRS})
  # at::parallel_for is a header template over OpenMP. Compiled with OpenMP and linked without, so
  # that its symbols come from the very runtime libtorch_cpu has loaded: one pool of threads.
  # The messages of torch's checks name their files: not where those were on the building machine.
  target_compile_options(${_target} PRIVATE ${BATCHOPS_WARNINGS} -fopenmp
    # The last that fits is taken, and the environment may lie in the source folder.
    "-ffile-prefix-map=${CMAKE_SOURCE_DIR}/=" "-ffile-prefix-map=${root}/include/=")
  target_link_libraries(${_target} PRIVATE batchops_core
    "${root}/lib/libtorch_cpu.so" "${root}/lib/libtorch_python.so" "${root}/lib/libc10.so"
    ${CMAKE_DL_LIBS})
  target_link_options(${_target} PRIVATE -Wl,--as-needed -Wl,--allow-shlib-undefined)
  set(${result} ${_target} PARENT_SCOPE)
endfunction()
