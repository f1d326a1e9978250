"""The routes that clients of OpenAI's API and of vLLM know, in their shapes."""
