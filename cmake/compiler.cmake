# CMake's own words on a missing compiler do not say what to install.
include(CheckLanguage)
check_language(CXX)
if(NOT CMAKE_CXX_COMPILER)
  message(FATAL_ERROR
    "batchops: no C++ compiler was found (CXX='$ENV{CXX}'). g++ 11, clang++ 14 or newer is needed. "
    "On Debian or Ubuntu, type:\n"
    "    apt-get install g++\n"
    "or name one: CXX=/path/to/g++ pip install --no-build-isolation .")
endif()
enable_language(CXX)
