"""The gateway: OpenAI's HTTP API in front of the scheduler and the engines. A process of its own; several may run."""
