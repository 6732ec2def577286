"""The bundled dialogues' generator, and the example job that learns a tool call."""
