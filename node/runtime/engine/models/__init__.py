"""Model families the engine can run. One module per family; `node.runtime.engine.weights` picks by ``model_type``."""
