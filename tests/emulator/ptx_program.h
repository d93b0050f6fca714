// PTX as nvcc prints it, read into statements: what each instruction and each of its operands is
// called, and nothing of what they mean (ptx_machine.h does).
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace cuda_emulator::ptx {

enum class Type : uint8_t {
  none,
  pred,
  b8,
  b16,
  b32,
  b64,
  u8,
  u16,
  u32,
  u64,
  s8,
  s16,
  s32,
  s64,
  f16,
  bf16,
  f16x2,
  bf16x2,
  f32,
  f64,
};
Type type_of(const std::string& name);  // none where it is no type's
unsigned size_of(Type type);            // bytes
bool is_signed(Type type);

enum class Space : uint8_t { generic, global, shared, param, local };

// Where a function's variables are: each has a register that holds its address.
struct Variable {
  std::string name;
  Space space;
  uint32_t bytes;
  uint32_t alignment;
  bool dynamic;  // shared memory whose size the launch says
  int32_t address;
};

struct Operand {
  enum class Kind : uint8_t { reg, immediate, special, label, list, memory };

  Kind kind;
  int32_t reg = -1;        // of reg and memory; below 0: an address that is the offset alone
  Type type = Type::none;  // of a register
  uint64_t bits = 0;       // of an immediate; of memory, the offset
  std::string name = {};   // of a special register, a label or a function
  std::vector<Operand> items = {};
};

struct Statement {
  unsigned line;
  int32_t guard = -1;  // a predicate's register
  bool guard_is_not = false;
  std::vector<std::string> words;  // the parts of its name: ld, global, v4, f32
  std::vector<Operand> operands;

  bool says(const char* word) const;
  std::string name() const;
};

struct Function {
  std::string file, name;
  bool entry = false;
  unsigned line = 0;
  int32_t registers = 0;
  std::vector<Variable> params;  // of a function, its result first
  std::vector<Variable> variables;
  std::vector<Statement> body;
  std::map<std::string, size_t> labels;  // where in the body they stand
};

class Syntax : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// All functions of a file's text. Throws Syntax, with file and line.
std::vector<std::unique_ptr<Function>> read(const std::string& file, const std::string& text);

}  // namespace cuda_emulator::ptx
