# Decides on CUDA loudly: a toolkit that is present but broken stops the build, it never turns into
# a CPU-only package without a word.
set(BATCHOPS_WITH_CUDA ${BATCHOPS_CUDA})
if(BATCHOPS_CUDA STREQUAL "AUTO")
  find_program(BATCHOPS_NVCC nvcc HINTS ENV CUDA_PATH ENV CUDA_HOME PATH_SUFFIXES bin)
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    set(BATCHOPS_WITH_CUDA ON)
  elseif(BATCHOPS_NVCC OR DEFINED ENV{CUDACXX})
    if(DEFINED ENV{CUDACXX})
      set(BATCHOPS_NVCC "$ENV{CUDACXX}")
    endif()
    message(FATAL_ERROR
      "batchops: nvcc was found (${BATCHOPS_NVCC}) but cannot compile and link a "
      "program. Mend the CUDA toolkit, or build for the CPU only:\n"
      "    BATCHOPS_CUDA=OFF pip install --no-build-isolation .")
  else()
    set(BATCHOPS_WITH_CUDA OFF)
  endif()
endif()

if(BATCHOPS_WITH_CUDA)
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    if(DEFINED ENV{CUDAARCHS})
      set(CMAKE_CUDA_ARCHITECTURES "$ENV{CUDAARCHS}")
    else()
      set(CMAKE_CUDA_ARCHITECTURES "75-real;80-real;86-real;89-real;90-real;100-real;120")
    endif()
  endif()
  set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
  enable_language(CUDA)
  set(CMAKE_CUDA_STANDARD 17)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  message(STATUS "batchops: CUDA ON, toolkit ${CMAKE_CUDA_COMPILER_VERSION}, "
                 "targets ${CMAKE_CUDA_ARCHITECTURES}")
else()
  message(STATUS "batchops: CUDA OFF: this build has CPU kernels only")
endif()

function(batchops_cuda_options target)
  set(_targets "${CMAKE_CUDA_ARCHITECTURES}")
  if(_targets STREQUAL "native")
    set(_targets "${CMAKE_CUDA_ARCHITECTURES_NATIVE}")
  endif()
  string(REPLACE "-real" "" _targets "${_targets}")
  string(REPLACE "-virtual" "" _targets "${_targets}")
  string(REPLACE ";" ",sm_" _targets "sm_${_targets}")
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 13.0)
    set(_compress --compress-mode=size)
  else()
    set(_compress -Xfatbin=-compress-all)
  endif()
  target_compile_options(${target} PRIVATE
    $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr --extended-lambda ${_compress}
    -Xcompiler=-Wall>)
  set_property(SOURCE csrc/kernels/cuda/info.cu APPEND PROPERTY
    COMPILE_DEFINITIONS "BATCHOPS_CUDA_TARGETS=\"${_targets}\"")
endfunction()
