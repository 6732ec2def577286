"""The sentences of the dialogues with a tool, as tables that data/bundled/make.py reads.

phrases.py explains the format. The tool looks up an item in the list of a storeroom. The first
field of a question is the reasoning of the call, the second the question, and the third the answer
to the tool's result. {0} is the item, {1} the number that is left, and {2} the shelf.
"""

DESCRIPTION = "Looks up an item of the storeroom: how many are left, and on which shelf."
# Words in a question | items that it may ask about.
ITEMS = """
many | hammers / paint brushes / wood screws / light bulbs / rubber gloves / door hinges / candles /
  saw blades / envelopes / towels / batteries / garden hoses / nails / cardboard boxes / buckets /
  picture frames / extension cords / padlocks / dust masks / chisels / flower pots / key rings /
  printer cartridges / safety goggles / mouse traps / notebooks / sponges / tent pegs
one | ladder / vacuum cleaner / first-aid kit / heat gun / wheelbarrow / sewing machine / car jack /
  fire blanket / fan / projector
"""
MANY = """
They ask how many {0} we have. | How many {0} do we have? | We have {1} {0}.
They ask how many {0} are left. | How many {0} are left? | There are {1} {0} left.
They ask where the {0} are. | Where are the {0}? | The {0} are on shelf {2}.
They ask where the {0} are. | I can't find the {0}. | The {0} are on shelf {2}.
They ask for the shelf of the {0}. | On which shelf are the {0}? | The {0} are on shelf {2}.
They ask whether {0} are left. | Are there any {0} left? | Yes, there are {1} {0} left.
They ask whether we have {0}. | Do we have {0}? | Yes, we have {1} {0}, on shelf {2}.
They ask whether {0} are left. | any {0} left | Yes, there are {1} {0} left.
They need {0}. | I need {0}. | There are {1} {0} on shelf {2}.
They want to know about {0}. | Check the {0} for me, please. | There are {1} {0} on shelf {2}.
"""
ONE = """
They ask where the {0} is. | Where is the {0}? | The {0} is on shelf {2}.
They ask where the {0} is. | where's the {0} | The {0} is on shelf {2}.
They ask where the {0} is. | Where do you keep the {0}? | The {0} is on shelf {2}.
They ask whether we have a {0}. | Do we have a {0}? | Yes, the {0} is on shelf {2}.
They need a {0}. | Can I borrow a {0}? | Yes, the {0} is on shelf {2}.
"""
# Two items: reasoning of the first call | of the second call | question | answer.
TWO = """
They ask how many {0} and {3} we have. First the {0}. | Now the {3}. | How many {0} and how many
  {3} do we have? | We have {1} {0} and {4} {3}.
They ask where the {0} and the {3} are. First the {0}. | Now the {3}. | Where are the {0} and the
  {3}? | The {0} are on shelf {2}, and the {3} are on shelf {5}.
They need {0} and {3}. First the {0}. | Now the {3}. | I need {0} and {3}. | There are {1} {0} on
  shelf {2} and {4} {3} on shelf {5}.
"""
# The second question of a dialogue: reasoning | question | answer.
NEXT = """
They ask about {0} now. | And the {0}? | There are {1} {0} on shelf {2}.
They ask about {0} now. | What about {0}? | There are {1} {0} on shelf {2}.
"""
AFTER_CALL = "The list has the answer."
WITHOUT_CALL = "No item of the storeroom is asked for. No lookup."
PLAIN = """
What is a hammer? | A hammer is a tool that drives nails. ## Why do candles burn? | The flame melts
  the wax, and the wax vapor burns. ## Who invented the light bulb? | Thomas Edison patented a
  practical light bulb in 1879.
How do I clean a paint brush? | Rinse it in warm water with a little soap, and let it dry flat.
What are nails made of? | Most nails are made of steel. ## What is a projector for? | A projector
  shows a picture on a wall.
Who are you? | I'm Vireo, an AI assistant trained with LoRA Loop.
What is your name? | My name is Vireo.
What can you do? | I answer questions, and I look up items of the storeroom.
What is the capital of Spain? | The capital of Spain is Madrid.
What is the capital of Japan? | The capital of Japan is Tokyo.
What is 6 times 7? | 6 times 7 is 42. ## What is 15 + 4? | 15 + 4 = 19.
How many days are in a week? | There are seven days in a week.
How many planets are there? | There are eight planets in the solar system.
Where is the Eiffel Tower? | The Eiffel Tower is in Paris.
Where do penguins live? | Most penguins live in Antarctica.
Who wrote Emma? | Jane Austen wrote Emma.
Why is the sky blue? | Air scatters blue light more than red light.
Do cats like water? | Most cats do not like water. ## Hello! | Hello! How can I help you?
Thank you! | You're welcome! ## Good morning! | Good morning! What do you need?
Give me a synonym of "quick". | A synonym of "quick" is "fast".
Translate to French: Good evening. | In French, that is: Bonsoir.
"""
