#include "ptx_program.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <utility>

namespace cuda_emulator::ptx {
namespace {

struct Named {
  const char* name;
  Type type;
  unsigned bytes;
};
constexpr Named kTypes[] = {
    {"pred", Type::pred, 1},   {"b8", Type::b8, 1},         {"b16", Type::b16, 2},
    {"b32", Type::b32, 4},     {"b64", Type::b64, 8},       {"u8", Type::u8, 1},
    {"u16", Type::u16, 2},     {"u32", Type::u32, 4},       {"u64", Type::u64, 8},
    {"s8", Type::s8, 1},       {"s16", Type::s16, 2},       {"s32", Type::s32, 4},
    {"s64", Type::s64, 8},     {"f16", Type::f16, 2},       {"bf16", Type::bf16, 2},
    {"f16x2", Type::f16x2, 4}, {"bf16x2", Type::bf16x2, 4}, {"f32", Type::f32, 4},
    {"f64", Type::f64, 8},
};

bool in_name(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' ||
         c == '$' || c == '%' || c == '.';
}

class Reader {
 public:
  Reader(const std::string& file, const std::string& text) : file_(file), text_(text) { next(); }

  std::vector<std::unique_ptr<Function>> all() {
    while (!token_.empty()) {
      if (token_ == ".visible" || token_ == ".weak" || token_ == ".extern") {
        next();
      } else if (token_ == ".version" || token_ == ".target" || token_ == ".address_size") {
        next();
        next();
        while (accept(",")) next();
      } else if (token_ == ".shared" || token_ == ".global" || token_ == ".const") {
        module_variable();
      } else if (token_ == ".entry" || token_ == ".func") {
        function();
      } else {
        fail("expected a declaration");
      }
    }
    return std::move(functions_);
  }

 private:
  using Names = std::map<std::string, std::pair<int32_t, Type>>;

  [[noreturn]] void fail(const std::string& what) const {
    throw Syntax(file_ + ":" + std::to_string(line_) + ": " + what + ", got '" + token_ + "'");
  }

  void next() {
    while (at_ < text_.size()) {
      const char c = text_[at_];
      if (c == '\n') ++line_;
      if (c == ' ' || c == '\t' || c == '\r' || c == '\n') {
        ++at_;
      } else if (text_.compare(at_, 2, "//") == 0) {
        at_ = std::min(text_.find('\n', at_), text_.size());
      } else {
        break;
      }
    }
    token_.clear();
    if (at_ >= text_.size()) return;
    const size_t begin = at_;
    if (in_name(text_[at_])) {
      while (at_ < text_.size()) {
        if (in_name(text_[at_])) {
          ++at_;
        } else if (text_.compare(at_, 2, "::") == 0) {
          at_ += 2;
        } else {
          break;
        }
      }
    } else if (text_[at_] == '"') {
      at_ = text_.find('"', at_ + 1) + 1;
    } else {
      ++at_;
    }
    token_ = text_.substr(begin, at_ - begin);
  }

  bool accept(const char* token) {
    if (token_ != token) return false;
    next();
    return true;
  }
  void expect(const char* token) {
    if (!accept(token)) fail(std::string("expected '") + token + "'");
  }
  std::string take() {
    std::string taken = token_;
    next();
    return taken;
  }
  uint32_t number() {
    const std::string text = take();
    return static_cast<uint32_t>(std::strtoul(text.c_str(), nullptr, 0));
  }

  // ".shared .align 8 .b8 name[808]" and the like; the token is after the space.
  Variable variable(Space space) {
    Variable v{"", space, 0, 0, false, -1};
    uint32_t each = 0;
    while (token_[0] == '.') {
      const std::string word = take();
      if (word == ".align") {
        v.alignment = number();
      } else if (const Type type = type_of(word.substr(1)); type != Type::none) {
        each = size_of(type);
      } else if (word != ".ptr" && word != ".global") {
        fail("unknown in a declaration: " + word);
      }
    }
    v.name = take();
    uint32_t count = 1;
    if (accept("[")) {
      v.dynamic = token_ == "]";
      count = v.dynamic ? 0 : number();
      expect("]");
    }
    v.bytes = each * count;
    v.alignment = std::max(v.alignment, each);
    return v;
  }

  void module_variable() {
    if (take() != ".shared") fail("only shared variables are known outside functions");
    module_.push_back(variable(Space::shared));
    expect(";");
  }

  void function() {
    functions_.push_back(std::make_unique<Function>());
    f_ = functions_.back().get();
    f_->file = file_;
    f_->line = line_;
    f_->entry = take() == ".entry";
    scopes_.assign(1, {});
    if (accept("(")) parameters();
    f_->name = take();
    if (accept("(")) parameters();
    for (const Variable& v : module_) add_variable(v);
    while (token_ != "{" && token_ != ";") next();  // .maxntid 256 and so on
    if (accept(";")) {
      functions_.pop_back();
      return;
    }
    expect("{");
    while (!accept("}")) statement();
  }

  void parameters() {
    while (!accept(")")) {
      expect(".param");
      Variable v = variable(Space::param);
      v.address = add_register(v.name, Type::b64);
      f_->params.push_back(v);
      accept(",");
    }
  }

  int32_t add_register(const std::string& name, Type type) {
    scopes_.back()[name] = {f_->registers, type};
    return f_->registers++;
  }
  void add_variable(Variable v) {
    v.address = add_register(v.name, Type::b64);
    f_->variables.push_back(v);
  }
  const std::pair<int32_t, Type>* find(const std::string& name) const {
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
      if (const auto found = scope->find(name); found != scope->end()) return &found->second;
    }
    return nullptr;
  }

  void statement() {
    if (accept("{")) {
      scopes_.emplace_back();
      while (!accept("}")) statement();
      scopes_.pop_back();
    } else if (token_[0] == '.') {
      directive();
    } else if (text_[at_] == ':') {
      f_->labels[take()] = f_->body.size();
      expect(":");
    } else {
      instruction();
    }
  }

  void directive() {
    const std::string word = take();
    if (word == ".reg") {
      const Type type = type_of(take().substr(1));
      do {
        const std::string name = take();
        if (accept("<")) {
          const uint32_t count = number();
          expect(">");
          for (uint32_t i = 0; i < count; ++i) add_register(name + std::to_string(i), type);
        } else {
          add_register(name, type);
        }
      } while (accept(","));
    } else if (word == ".shared" || word == ".local" || word == ".param") {
      add_variable(variable(word == ".shared"  ? Space::shared
                            : word == ".local" ? Space::local
                                               : Space::param));
    } else if (word == ".pragma") {
      next();
    } else {
      fail("unknown directive " + word);
    }
    expect(";");
  }

  void instruction() {
    Statement s;
    s.line = line_;
    if (accept("@")) {
      s.guard_is_not = accept("!");
      const Operand guard = operand();
      if (guard.kind != Operand::Kind::reg) fail("expected a predicate");
      s.guard = guard.reg;
    }
    const std::string name = take();
    for (size_t begin = 0; begin <= name.size();) {
      const size_t end = std::min(name.find('.', begin), name.size());
      s.words.push_back(name.substr(begin, end - begin));
      begin = end + 1;
    }
    while (!accept(";")) {
      s.operands.push_back(operand());
      if (accept("|")) s.operands.push_back(operand());
      if (token_ != ";") expect(",");
    }
    f_->body.push_back(std::move(s));
  }

  Operand list(const char* end) {
    Operand all{Operand::Kind::list};
    while (!accept(end)) {
      all.items.push_back(operand());
      accept(",");
    }
    return all;
  }

  Operand operand() {
    if (accept("{")) return list("}");
    if (accept("(")) return list(")");
    if (accept("[")) return memory();
    const bool negative = accept("-");
    const bool is_not = !negative && accept("!");
    if (is_not) fail("a negated operand is unknown");
    const std::string text = take();
    if (const auto* found = find(text)) {
      return {Operand::Kind::reg, found->first, found->second};
    }
    if (text[0] == '%') return {Operand::Kind::special, -1, Type::none, 0, text.substr(1)};
    if (text[0] >= '0' && text[0] <= '9') {
      return {Operand::Kind::immediate, -1, Type::none, immediate(text, negative)};
    }
    return {Operand::Kind::label, -1, Type::none, 0, text};
  }

  static uint64_t immediate(const std::string& text, bool negative) {
    if (text.size() > 2 && text[0] == '0' && (text[1] == 'f' || text[1] == 'd')) {
      return std::strtoull(text.c_str() + 2, nullptr, 16);
    }
    const uint64_t bits = std::strtoull(text.c_str(), nullptr, 0);  // of 1.0, which stands alone, 1
    return negative ? 0 - bits : bits;
  }

  // [register], [register+8], [variable+-4], [8]
  Operand memory() {
    Operand place{Operand::Kind::memory};
    if (token_[0] >= '0' && token_[0] <= '9') {
      place.bits = immediate(take(), false);
    } else {
      const auto* found = find(token_);
      if (found == nullptr) fail("expected an address");
      next();
      place.reg = found->first;
      place.type = found->second;
      if (accept("+")) {
        const bool negative = accept("-");
        place.bits = immediate(take(), negative);
      }
    }
    expect("]");
    return place;
  }

  const std::string file_;
  const std::string& text_;
  size_t at_ = 0;
  unsigned line_ = 1;
  std::string token_;
  std::vector<std::unique_ptr<Function>> functions_;
  std::vector<Variable> module_;
  Function* f_ = nullptr;
  std::vector<Names> scopes_;
};

}  // namespace

Type type_of(const std::string& name) {
  for (const Named& one : kTypes) {
    if (name == one.name) return one.type;
  }
  return Type::none;
}

unsigned size_of(Type type) {
  for (const Named& one : kTypes) {
    if (type == one.type) return one.bytes;
  }
  return 0;
}

bool is_signed(Type type) {
  return type == Type::s8 || type == Type::s16 || type == Type::s32 || type == Type::s64;
}

bool Statement::says(const char* word) const {
  return std::find(words.begin(), words.end(), word) != words.end();
}

std::string Statement::name() const {
  std::string all;
  for (const std::string& word : words) all += (all.empty() ? "" : ".") + word;
  return all;
}

std::vector<std::unique_ptr<Function>> read(const std::string& file, const std::string& text) {
  return Reader(file, text).all();
}

}  // namespace cuda_emulator::ptx
