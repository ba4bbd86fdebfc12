"""OpenAI's Responses API over the same engine, tools and grammars as its chat completions. Nothing
is stored: each request brings its whole dialogue."""
