// Stands for TensorRT's libraries under its own Python bindings, which load over it and take plugins as usual.

// What a dimension's expression is: the bindings hand its address on, and ask for nothing but its type.
struct Expression
{
    virtual ~Expression() = default;
};

extern "C" {

void* make_expression() { return new Expression; }

void* createInferBuilder_INTERNAL() { return nullptr; }
void* createInferRefitter_INTERNAL() { return nullptr; }
void* createInferRuntime_INTERNAL() { return nullptr; }
void* createNvOnnxParserRefitter_INTERNAL() { return nullptr; }
void* createNvOnnxParser_INTERNAL() { return nullptr; }
void* getBuilderPluginRegistry() { return nullptr; }
void* getNvOnnxParserVersion() { return nullptr; }
void* getPluginRegistry() { return nullptr; }
void* initLibNvInferPlugins() { return nullptr; }
}
