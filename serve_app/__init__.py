"""The model side: data, features, model, training, registry, engine, and the Ray Serve deployment. Knows no HTTP."""
