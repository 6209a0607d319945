// Makes the class known under the name of older builds, torch.classes.FasterTransformerEncoder, for files traced then.
//
// torch::class_ insists on a namespace now, so the type and its three methods are put together by hand.
#include <ATen/core/builtin_function.h>
#include <torch/custom_class.h>

#include <functional>
#include <memory>

#include "encoder.h"

namespace fastertransformer {
namespace {

using torch::jit::Stack;

const char* const kName = "__torch__.torch.classes.FasterTransformerEncoder";

void add_method(const c10::ClassTypePtr& type, const std::string& name, std::vector<c10::Argument> arguments,
                const c10::TypePtr& result, std::function<void(Stack&)> body) {
  arguments.insert(arguments.begin(), c10::Argument("self", type));
  c10::FunctionSchema schema(name, "", std::move(arguments), {c10::Argument("", result)});
  auto method = std::make_unique<torch::jit::BuiltinOpFunction>(c10::QualifiedName(std::string(kName) + "." + name),
                                                                std::move(schema), std::move(body));
  type->addMethod(method.get());
  torch::registerCustomClassMethod(std::move(method));
}

c10::intrusive_ptr<Encoder> hold(const c10::IValue& self) {
  return c10::static_intrusive_pointer_cast<Encoder>(self.toObject()->getSlot(0).toCapsule());
}

bool register_legacy() {
  const auto type = c10::ClassType::create(c10::QualifiedName(kName), std::weak_ptr<torch::jit::CompilationUnit>());
  type->addAttribute("capsule", c10::CapsuleType::get());
  torch::registerCustomClass(type);
  const c10::TypePtr tensor = c10::TensorType::get(), tensors = c10::ListType::ofTensors();
  add_method(type, "forward",
             {c10::Argument("hidden_states", tensor), c10::Argument("attention_mask", tensor),
              c10::Argument("trt_seqlen_offset", tensor), c10::Argument("sequence_id_offset", tensor)},
             tensor, [](Stack& stack) {
               auto inputs = torch::jit::pop(stack, 5);
               stack.emplace_back(hold(inputs[0])->forward(inputs[1].toTensor(), inputs[2].toTensor(),
                                                           inputs[3].toTensor(), inputs[4].toTensor()));
             });
  add_method(type, "__getstate__", {}, tensors, [](Stack& stack) {
    const auto self = torch::jit::pop(stack);
    stack.emplace_back(c10::List<at::Tensor>(hold(self)->state()));
  });
  add_method(type, "__setstate__", {c10::Argument("state", tensors)}, c10::NoneType::get(), [](Stack& stack) {
    const auto state = torch::jit::pop(stack).toTensorVector();
    const auto self = torch::jit::pop(stack);
    self.toObject()->setSlot(0, c10::IValue::make_capsule(Encoder::restore(state)));
    stack.emplace_back();
  });
  return true;
}

const bool registered = register_legacy();

}  // namespace
}  // namespace fastertransformer
