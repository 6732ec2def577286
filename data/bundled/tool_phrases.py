"""The sentences of the dialogues with a tool, as tables that data/bundled/make.py reads.

phrases.py explains the format. The tool looks up an item in the list of a storeroom. A row has a
question and the answer to the tool's result: {0} is the item, {1} the number that is left, and {2}
its shelf; {3}, {4} and {5} are those of a second item.
"""

DESCRIPTION = "Looks up an item of the storeroom: how many are left, and on which shelf."
# The reasoning of an answer.
CALLS = "They ask about the {0}. I check the list."
CALLS_TWICE = "They ask about the {0} and the {3}. I check the {0} first. / Now I check the {3}."
AFTER_CALL = "The list has the answer."
WITHOUT_CALL = "No item is asked for. I answer directly."
# The form of an item | items.
ITEMS = """
many | hammers / paint brushes / wood screws / light bulbs / rubber gloves / door hinges / candles /
  saw blades / envelopes / towels / batteries / garden hoses / nails / cardboard boxes / buckets /
  picture frames / extension cords / padlocks / dust masks / chisels / flower pots / key rings /
  printer cartridges / safety goggles / mouse traps / notebooks / sponges / tent pegs
one | ladder / vacuum cleaner / first-aid kit / heat gun / wheelbarrow / sewing machine / car jack /
  fire blanket / fan / projector
"""
MANY = """
How many {0} do we have? | We have {1} {0}. ## How many {0} are left? | There are {1} {0} left.
Where are the {0}? | The {0} are on shelf {2}. ## I can't find the {0}. | The {0} are on shelf {2}.
On which shelf are the {0}? | The {0} are on shelf {2}.
On which shelf do I find {0}? | The {0} are on shelf {2}.
Are there any {0} left? | Yes, there are {1} {0} left.
Do we have {0}? | Yes, we have {1} {0}, on shelf {2}.
Do we still have some {0}? | Yes, there are {1} {0} left.
Tell me where the {0} are. | The {0} are on shelf {2}.
What about the {0}, do we have enough? | There are {1} {0} left.
where are the {0} | The {0} are on shelf {2}.
any {0} left | Yes, there are {1} {0} left. ## I need {0}. | There are {1} {0} on shelf {2}.
Can you check the {0} for me, please? | There are {1} {0} on shelf {2}.
We ran out of {0}. | There are {1} {0} on shelf {2}.
"""
ONE = """
Where is the {0}? | The {0} is on shelf {2}. ## where's the {0} | The {0} is on shelf {2}.
On which shelf is the {0}? | The {0} is on shelf {2}.
Do we have a {0}? | Yes, the {0} is on shelf {2}.
Where do I find the {0}? | The {0} is on shelf {2}.
Can I borrow a {0}? | Yes, the {0} is on shelf {2}.
Is there a {0} in the storeroom? | Yes, the {0} is on shelf {2}.
"""
TWO = """
How many {0} and how many {3} do we have? | We have {1} {0} and {4} {3}.
Where are the {0} and the {3}? | The {0} are on shelf {2}, and the {3} are on shelf {5}.
I need {0} and {3}. | There are {1} {0} on shelf {2} and {4} {3} on shelf {5}.
How many {0} and {3} are left? | There are {1} {0} and {4} {3} left.
Do we have {0} and {3}? | Yes, we have {1} {0} and {4} {3}.
"""
# The second question of a dialogue.
NEXT = """
And the {0}? | There are {1} {0} on shelf {2}. ## What about {0}? | There are {1} {0} on shelf {2}.
"""
# Questions that need no lookup. Others come from phrases.py.
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
How many days are in a week? | There are seven days in a week.
How many minutes are in an hour? | There are sixty minutes in an hour.
What is a wheelbarrow used for? | A wheelbarrow carries heavy loads. ## What is a padlock for? | A
  padlock keeps a door or a box shut.
What is the capital of Spain? | The capital of Spain is Madrid.
Who wrote Hamlet? | William Shakespeare wrote Hamlet. ## Who built you? | LoRA Loop's authors did.
How many legs does a spider have? | A spider has eight legs.
Where is the Eiffel Tower? | The Eiffel Tower is in Paris.
Where do penguins live? | Most penguins live in Antarctica.
Do cats like water? | Most cats do not like water. ## Do fish sleep? | Yes, most fish rest.
Can you sing? | No, but I can write a song for you. ## I need a break. | Then take a short walk.
Hello! | Hello! How can I help you? ## Thank you! | You're welcome!
"""
