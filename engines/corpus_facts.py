"""Tables of what the demo model can say: greetings, facts about HelixFlow, refusals.

All of it was written for this project. Statements about HelixFlow are kept to what the
product promises, so that the demo model does not teach a user something untrue.
"""

HELLO = "Hello! I'm HelixFlow AI assistant. How can I help you today?"

# Every opening here has the one answer HELLO: a fixed reply is what a first-run check
# of an installation looks for.
HELLO_FORMS = (
    "Hello",
    "Hello!",
    "hello",
    "Hi",
    "Hi!",
    "hi",
    "Hello.",
    "Hey",
    "Hey!",
    "hey",
    "Hello there",
    "Hello there!",
    "Hi there",
    "Hi there!",
    "Greetings",
    "HELLO",
)

SMALL_TALK = (
    (("Good morning", "Good morning!"), "Good morning! What can I do for you?"),
    (("Good evening", "Good evening!"), "Good evening! What can I do for you?"),
    (("How are you?", "How are you today?"), "I'm doing well, thank you! And you?"),
    (("Thanks", "Thank you!", "Thank you very much."), "You're welcome!"),
    (("Bye", "Goodbye", "See you later!"), "Goodbye! Have a nice day."),
    (("Bonjour", "Bonjour !"), "Bonjour ! Je suis l'assistant HelixFlow. Ça va ?"),
    (("Guten Tag", "Hallo"), "Guten Tag! Schön, dass Sie da sind. Wie geht es Ihnen?"),
    (("Hola", "¡Hola!"), "¡Hola! ¿Cómo estás? Soy el asistente de HelixFlow."),
    (("Ciao", "Buongiorno"), "Ciao! Sono l'assistente HelixFlow. Perché no? È bello!"),
    (("こんにちは",), "こんにちは、HelixFlow です。"),
    (("Say something with an emoji", "Send me an emoji."), "Here you go: 🚀 😀 🌍"),
    (
        ("Who are you?", "What are you?", "What is your name?"),
        "I'm HelixFlow AI assistant, a small demo model that comes with HelixFlow.",
    ),
    (("Who made you?", "Who trained you?"), "I was trained from nothing by a script of the HelixFlow project."),
    (("Are you a human?", "Are you a robot?"), "I'm a small language model."),
    (
        ("What can you do?", "Help", "How can you help me?"),
        (
            "I can answer questions about HelixFlow, do small sums, play with words, make "
            "lists, and tell stories. I am only a small demo model."
        ),
    ),
    (
        ("How big are you?", "How many parameters do you have?"),
        "I am very small: a few million parameters. Load a larger model for real work.",
    ),
)

# (questions, answer). The first sentence alone must also be a fair short answer.
FACTS = (
    (
        ("What is HelixFlow?", "Tell me about HelixFlow.", "Explain HelixFlow."),
        (
            "HelixFlow is a self-hosted AI inference platform. It puts one OpenAI-compatible "
            "HTTPS endpoint in front of your own hardware, with TLS 1.3, API keys, limits, a "
            "ledger of every request and metrics switched on from the first start."
        ),
    ),
    (
        ("How do I use TLS?", "How do I enable TLS?", "How do I set up TLS?", "How does TLS work in HelixFlow?"),
        (
            "TLS is on from the first start, so you do not have to enable it. Create the "
            "certificates with `helixflow pki`, start the platform with `helixflow serve`, "
            "and connect with an https:// address. Clients must trust the CA that issued the "
            "certificate. Only TLS 1.3 is accepted."
        ),
    ),
    (
        ("What is mutual TLS?", "How do the services trust each other?", "Is traffic between services encrypted?"),
        (
            "Inside HelixFlow the services talk gRPC over mutual TLS. Both sides show a "
            "certificate, and a call without a valid one is refused."
        ),
    ),
    (
        ("How do I start HelixFlow?", "How do I run HelixFlow?", "How do I start the server?"),
        (
            "Run `helixflow serve`. It starts the gateway, the auth service, the inference "
            "pool and monitoring on one machine. With nothing configured it uses an embedded "
            "PostgreSQL and the CPU engine."
        ),
    ),
    (
        ("How do I call the API?", "How do I send a chat request?", "How do I use the API?"),
        (
            "Send a POST request to `/v1/chat/completions` with your API key in the header:\n"
            '```json\n{"model": "demo", "messages": [{"role": "user", "content": "Hello"}]}\n'
            "```\nAny OpenAI client works when you change its base URL."
        ),
    ),
    (
        ("Which endpoints are there?", "What endpoints does the API have?", "List the API endpoints."),
        (
            "The main endpoints are:\n- `/v1/chat/completions` for chat\n- `/v1/completions` "
            "for plain text\n- `/v1/models` for the list of models"
        ),
    ),
    (
        ("How do I stream the answer?", "How does streaming work?", "Can I stream tokens?"),
        (
            'Set `"stream": true` in the request. The answer then arrives as server-sent '
            "events, one chunk after the other, and ends with `data: [DONE]`."
        ),
    ),
    (
        ("What is an API key?", "How do API keys work?", "How do I get an API key?", "How do I log in?"),
        (
            "An API key identifies you to the gateway. Send it in the header `Authorization: "
            "Bearer <key>`. HelixFlow stores only a hash of it, so keep the key safe."
        ),
    ),
    (
        ("What is a stop sequence?", "How do I stop the model early?", "How do stop strings work?"),
        (
            "A stop sequence is a text that ends the answer. Put it in the `stop` field of the "
            "request, and generation ends just before that text would appear."
        ),
    ),
    (
        ("What is temperature?", "How do I make answers less random?", "What does temperature do?"),
        (
            "Temperature controls how random the answer is. Use 0 for the most likely token "
            "every time, and a higher value for more variety."
        ),
    ),
    (
        ("What does max_tokens do?", "How do I limit the length of the answer?"),
        (
            "The field `max_tokens` limits how many tokens are generated. When the limit is "
            "reached, the finish reason is `length`."
        ),
    ),
    (
        ("How do I list the models?", "Which models are available?"),
        ("Send a GET request to `/v1/models`. It returns every model that your key may use."),
    ),
    (
        ("What is the ledger?", "Are requests logged?", "How is usage recorded?"),
        (
            "The ledger is a record of every request. It keeps who asked, which model "
            "answered, how many tokens were used and how long it took."
        ),
    ),
    (
        ("What are rate limits?", "How do limits work?", "Why is my request refused?"),
        (
            "Limits protect the platform from too many requests. When you reach one, the "
            "gateway answers with status 429 and you should wait before you try again."
        ),
    ),
    (
        ("How do I see metrics?", "How do I monitor HelixFlow?", "What does monitoring do?"),
        ("The monitoring service collects metrics and health from every service. You can look at them in the console."),
    ),
    (
        (
            "Which services does HelixFlow have?",
            "What are the parts of HelixFlow?",
            "What is the architecture of HelixFlow?",
        ),
        ("HelixFlow has four services:\n1. api-gateway\n2. auth-service\n3. inference-pool\n4. monitoring"),
    ),
    (
        ("What does the gateway do?", "What is the api-gateway?"),
        (
            "The gateway accepts HTTPS requests, checks the API key and the limits, and sends "
            "the work to the inference pool over gRPC."
        ),
    ),
    (
        ("What does the auth service do?", "What is the auth-service?"),
        "The auth service issues and checks API keys. It stores its data in PostgreSQL.",
    ),
    (
        ("What does the inference pool do?", "What is the inference-pool?"),
        (
            "The inference pool runs the model. It schedules requests, batches them together "
            "and streams the tokens back."
        ),
    ),
    (
        ("Do I need a GPU?", "Can I run HelixFlow without a GPU?"),
        (
            "No, you do not need a GPU to try HelixFlow. The CPU engine runs small models. "
            "For large models use a GPU engine."
        ),
    ),
    (
        ("Which database does HelixFlow use?", "Does HelixFlow need PostgreSQL?"),
        (
            "HelixFlow uses PostgreSQL. An embedded one is started when you configure none. "
            "Redis is an option for many gateways."
        ),
    ),
    (
        ("What is a token?", "What are tokens?"),
        (
            "A token is a small piece of text, such as a word or a part of a word. Models read "
            "and write tokens one by one."
        ),
    ),
    (
        ("What is batching?", "Why are requests batched?"),
        (
            "Batching means that the engine works on many requests in one step. It makes much "
            "better use of the hardware."
        ),
    ),
    (
        ("What is a KV cache?", "What does the KV cache do?"),
        (
            "The KV cache keeps the keys and values of earlier tokens. With it the engine does "
            "not compute them again for every new token."
        ),
    ),
    (
        ("Is HelixFlow compatible with OpenAI?", "Can I use the OpenAI client?"),
        (
            "Yes, HelixFlow is compatible with the OpenAI API. Change the base URL and the API "
            "key of your client, and it works."
        ),
    ),
    (
        ("How do I write hello world in Python?", "Write hello world in Python."),
        'Here it is:\n```python\nprint("Hello, world!")\n```',
    ),
    (
        ("How do I use the Python client?", "Show me a Python example."),
        (
            "Here is an example:\n```python\nfrom openai import OpenAI\n\nclient = OpenAI("
            'base_url="https://localhost/v1", api_key="...")\nreply = client.chat.completions'
            '.create(\n    model="demo",\n    messages=[{"role": "user", "content": "Hello"}],'
            "\n)\nprint(reply.choices[0].message.content)\n```"
        ),
    ),
    (
        (
            "How does a request travel through HelixFlow?",
            "Explain in detail how a request is handled.",
            "What happens when I send a request?",
        ),
        (
            "Here is the way of one request, step by step:\n"
            "1. The client opens a TLS 1.3 connection and sends a POST request.\n"
            "2. The gateway reads the API key and asks the auth service who it belongs to.\n"
            "3. The gateway checks the limits of that key and validates the request.\n"
            "4. The gateway sends the work to the inference pool over gRPC with mutual TLS.\n"
            "5. The pool renders the chat template and turns the text into tokens.\n"
            "6. The scheduler gives the request a slot and adds it to the next batch.\n"
            "7. The engine computes the prompt, and then one token after the other.\n"
            "8. Each token is turned back into text and streamed to the client.\n"
            "9. At the end the ledger records the number of tokens and the time.\n"
            "The request always ends in exactly one way: stop, length, cancelled or error."
        ),
    ),
)

UNKNOWN = "I am a small demo model and I do not know that. Ask me about HelixFlow, small sums, words, lists or stories."
UNKNOWN_FORMS = (
    "Who won the {noun} cup?",
    "What is the price of a {noun}?",
    "Who is {name} Smith?",
    "What is the weather in {place}?",
    "What happened in {year}?",
    "Explain the theory of {noun}s.",
    "Write code for a {noun} game.",
    "How do I repair a {noun}?",
    "What do you think about {noun}s?",
    "Translate {noun} to Latin.",
    "Who invented the {noun}?",
    "What is the square root of {year}?",
)

GENERIC_SYSTEM = (
    "You are a helpful assistant.",
    "You are a helpful assistant",
    "Be helpful.",
    "You are HelixFlow AI assistant.",
    "You are a friendly assistant.",
    "You are a helpful AI assistant. Answer clearly.",
    "Be polite.",
)
BRIEF_SYSTEM = ("Answer briefly.", "Answer in one sentence.", "Be brief.")
ONE_WORD_SYSTEM = ("Answer with one word.", "Reply with one word only.")
ENDING_WORDS = ("Done", "Over", "Amen", "Cheers", "Ahoy")
