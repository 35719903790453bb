"""The words of the made-up world, written by hand; `make_world` draws people and shops."""

WOMEN = """
Ada Agnes Alba Alice Alma Amber Amelia Anna Astrid Aurora Beatrice Bella Bertha Bianca Bonnie
Brenda Bridget Camilla Carla Carmen Cecilia Celeste Clara Claudia Cora Cordelia Daphne Delia
Diana Dora Doris Edith Edna Elena Elisa Ella Eloise Elsa Emily Emma Erica Esther Ethel Eva Evelyn
Felicia Fiona Flora Frances Frida Gemma Gerda Gina Gloria Greta Hanna Harriet Hazel Hedda Helena
Hilda Ida Imogen Ines Ingrid Irene Iris Isabel Ivy Jana Jasmine Joan Johanna Josie Judith Julia Juno
Karen Kira Lara Laura Leila Lena Leonora Lidia Lillian Linda Lotta Louisa Lucy Luna Lydia Mabel
Magda Marcia Margot Maria Marina Martha Matilda Maya Melissa Mina Miriam Molly Monica Nadia Naomi
Nelly Nina Nora Octavia Olga Olive Olivia Paula Petra Phoebe
""".split()

MEN = """
Aaron Abel Adam Adrian Alan Albert Alfred Andrew Anton Archie Arnold Arthur Axel Barnaby Basil
Benjamin Bernard Boris Bruno Caleb Carl Casper Cedric Charles Clement Clive Colin Conrad Cyril
Damian Daniel David Dennis Derek Dominic Douglas Edgar Edmund Edward Elias Elliot Emil Eric Ernest
Ethan Eugene Felix Fergus Finn Francis Frank Fred Gabriel Gareth George Gerald Gideon Gilbert
Godfrey Gordon Graham Gregor Gustav Harold Harvey Hector Henry Herbert Howard Hubert Hugo Ian Igor
Isaac Ivan Jacob James Jasper Jerome Joel John Jonas Joseph Julian Kasper Keith Kevin Konrad Lars
Laurence Leo Leonard Lewis Linus Lionel Louis Lucas Luther Magnus Malcolm Marcus Martin Matthew
Maurice Max Michael Milo Morris Nathan Neil Nicholas Nigel Noah Norman Oliver Orson Oscar Oswald
Otto Owen
""".split()

LAST_NAMES = """
Abbott Acton Adair Alder Allard Ambler Appleby Archer Arden Arkwell Ashby Ashdown Aston Atwood
Ayler Babbage Bagley Baines Balfour Banner Barlow Barnett Barton Bascombe Bateman Baxter Beaufort
Beckett Bellamy Benson Beresford Berwick Bexley Birch Blackwell Blake Bloom Bolton Booth Bowen
Bracken Bradley Bramwell Brandt Brewster Briggs Bristow Broadbent Bromley Buckley Burdock Burgess
Burnham Burton Byers Calder Callow Camden Carlow Carraway Carver Caswell Chadwick Chandler Chester
Clayton Clifford Cobham Colby Conway Corbett Cotton Crane Crawford Cresswell Croft Crosby Culver
Cutler Dalton Danvers Darby Dawson Deacon Denham Dexter Digby Dixon Dobson Dorsey Draper Drummond
Dudley Dunmore Eagleton Easton Eddison Egerton Eldridge Elgar Ellery Elwood Emerson Endicott
Everard Fairfax Farley Farrow Faulkner Fenton Ferris Fielding Finch Fletcher Flint Forsyth Foster
Fowler Frost Fuller Gaines Galloway Garland Garrick Gibson Gifford Gladwin Glover Godwin Goodall
Grafton Granger Grantham Greaves Gresham Grimes Grover Hadley Hale Halifax Hammond Hancock Hardy
Hargrave Harker Hartley Haskell Hatcher Hawkins Hayward Heath Hewitt Hobbs Holbrook Holloway Hooper
Horner Hudson Huxley Ingham Irving Jarvis Jenner Jessop Joyce Keating Keller Kemble Kendrick Kersey
Kimball Kingsley Kirby Knapp Lambert Lancaster Langdon Larkin Latham Lawson Leighton Lester
Lindley Lister Lockwood Lomax Lovell Ludlow Lyndon Maddox Mallory Manning Marlow Marsden Mason
Maxwell Mayhew Mercer Merrick Milburn Mills Monroe Moreton Mortimer Moss Naylor Nesbit Newell
Nichols Norton Norwood Oakley Ogden Orwell Osborne Oxley Padgett Palmer Parrish Paxton Peabody
Pelham Penrose Perkins Pickett Plummer Porter Prescott Preston Quigley Quincy Radcliffe Ramsey
Redfern Redmond Ridley Rigby Ripley Rowley Royce Rudge Rushton Ryder Salter Sanford Sawyer Selby
Seward Sheldon Shipley Sinclair Skelton Slater Somers Spencer Stafford Stanton Starling Stokes
Sutton Swift Talbot Tanner Tatum Thatcher Thorne Tilley Tobin Townsend Travers Trent Tucker Turner
Tyler Underhill Vance Vernon Vickers Wadham Wainwright Walton Warner Waverly Webster Wentworth
Weston Wexford Wheeler Whitlock Wilder Willard Winslow Wolcott Woodruff Wyatt Yardley Yates York
""".split()

# region: its towns
REGIONS = {
    "Norland": "Harwick Elmford Stonebury Coldwater Frosthill Highmoor Pinegate".split(),
    "Estmark": "Millbrook Saltby Eastholm Larkfield Reedham Goldcrest Tidewell".split(),
    "Suthmoor": "Bramley Oakhurst Sunfield Vinely Hopton Appleton Warmley".split(),
    "Westvale": "Greystone Wolfden Rainford Mistley Clifton Deepdale Ravenby".split(),
    "Midshire": "Kingsworth Marketon Bridgeham Castleby Crossley Abbeyton Wheatley".split(),
    "Lakeside": "Swanmere Heronby Trouton Lilywater Boatwell Islington Willowby".split(),
    "Hillmark": "Sheepcote Peakton Copperfell Ironby Slatewick Goatfell Windlow".split(),
    "Seabourne": "Gullhaven Anchorby Shellness Netherport Cragmouth Sandwich Pearlby".split(),
}

# job: the tool of the trade
JOBS = {
    "baker": "oven", "farmer": "tractor", "tailor": "needle", "painter": "brush",
    "carpenter": "hammer", "plumber": "wrench", "doctor": "stethoscope", "nurse": "thermometer",
    "teacher": "blackboard", "writer": "typewriter", "sailor": "compass", "fisher": "net",
    "miner": "pickaxe", "gardener": "spade", "barber": "razor", "butcher": "cleaver",
    "brewer": "barrel", "weaver": "loom", "potter": "wheel", "printer": "press",
    "pilot": "radar", "astronomer": "telescope", "chemist": "flask", "biologist": "microscope",
    "lawyer": "folder", "judge": "gavel", "singer": "microphone", "drummer": "drum",
    "pianist": "piano", "violinist": "violin", "photographer": "camera", "editor": "pencil",
    "librarian": "catalogue", "postman": "bicycle", "firefighter": "hose", "detective": "notebook",
    "jeweller": "magnifier", "locksmith": "key", "blacksmith": "anvil", "mechanic": "jack",
    "electrician": "cable", "roofer": "ladder", "mason": "trowel", "glazier": "cutter",
    "dentist": "drill", "optician": "lens", "surgeon": "scalpel", "cook": "pan",
    "waiter": "tray", "cleaner": "mop", "driver": "van", "porter": "trolley",
    "clerk": "stamp", "banker": "calculator", "shepherd": "crook", "beekeeper": "smoker",
    "cobbler": "glue", "saddler": "awl", "clown": "balloon", "dancer": "mirror",
}  # fmt: skip

LIKES = """
chess soup opera fishing cheese poetry jazz cycling coffee puzzles swimming honey theatre running
chocolate astronomy cards skating tea knitting football sushi hiking rowing cinema pasta tennis
gardening painting boxing curry sailing dancing baking roses archery comics skiing mushrooms camping
golf radio history magic pancakes climbing trains pottery sculpture rugby olives cricket peaches
bowling ballet origami karate lemonade surfing mountains
""".split()

PETS = """
cat dog parrot rabbit hamster pony goat snake turtle goldfish canary lizard mouse duck ferret
donkey hedgehog pigeon spider hen frog crow
""".split()

SHOP_ADJECTIVES = "Blue Golden Happy Silver Little Green Crooked Quiet Merry Busy".split()
SHOP_NOUNS = """
Kettle Lantern Button Barrow Basket Feather Anchor Thimble Candle Ladder Acorn Bell Teapot Owl
Mitten Compass Wagon Pepper Ribbon Clock
""".split()
GOODS = """
hats boots candles clocks lamps maps books pens paper ribbons buttons carpets curtains mirrors
plates spoons kettles baskets brooms ropes nails paint bricks tiles seeds flowers apples pears
plums cherries bread cakes pies jam butter eggs milk sausages ham salt spices sugar toys dolls
kites drums flutes guitars gloves scarves coats belts rings umbrellas bags tents lanterns soap
perfume pillows
""".split()

# places to eat, for slots to text
PLACE_ADJECTIVES = "Red Old White Royal Lucky Hungry Wild Jolly Tiny Purple Sleepy Proud".split()
PLACE_NOUNS = "Oak Lion Swan Bear Crown Mill Harp Fox Horse Star Garden Dragon".split()
KINDS = "inn cafe bar bakery diner".split()
FOODS = "soup stew pasta curry salad pizza fish cake pie noodles rice waffles".split()
PRICES = "cheap fair costly".split()
AREAS = "river market station harbour park church".split()

# reviews: what is judged, and the words that praise or blame it
ASPECTS = {
    "food": (
        "soup bread fish pie tea breakfast dinner cake salad sauce".split(),
        "tasty fresh delicious tender superb".split(),
        "stale burnt bland greasy sour".split(),
    ),
    "people": (
        "waiter owner guide driver host staff cook barber".split(),
        "friendly polite patient cheerful helpful".split(),
        "rude lazy grumpy careless clumsy".split(),
    ),
    "place": (
        "room garden hall bed window view street bath".split(),
        "clean cosy bright lovely charming".split(),
        "dirty noisy gloomy shabby cramped".split(),
    ),
    "show": (
        "music film play book song story concert dance".split(),
        "moving funny clever gripping graceful".split(),
        "boring dull silly tedious clumsy".split(),
    ),
}
PRAISE = "great good wonderful excellent splendid perfect".split()
BLAME = "awful bad terrible dreadful horrible poor".split()
LABELS = [
    ("good", "bad"), ("positive", "negative"), ("happy", "sad"), ("yes", "no"), ("up", "down"),
    ("plus", "minus"), ("love", "hate"), ("win", "loss"), ("fine", "poor"), ("pleased", "angry"),
]  # fmt: skip

# stories
OBJECTS = """
box lamp coin letter crown rope bottle boat drum cup chair bell ring map shell stone feather cloak
sword jar whistle wheel lantern statue scroll bucket flag blanket pebble acorn
""".split()
PLACES = """
forest market harbour castle garden bridge cave tower meadow village beach library mill station
valley island orchard cellar barn well stalls rails ships trees tavern parlour den hearth hall
""".split()
MATERIALS = "silver wooden glass copper paper stone leather golden iron clay".split()
STATES = """
broken heavy shiny dusty tiny huge empty ancient strange precious wet frozen humble honest lordly
""".split()
ANIMALS = "fox owl bear wolf deer otter badger swan beetle squirrel goose horse".split()
FEELINGS = "glad proud tired worried hungry curious calm afraid lonely grateful".split()
ADVERBS = "slowly quickly quietly carefully gladly bravely suddenly softly gently loudly".split()
SKY = "snow frost hail rain sun wind fog thunder storm clouds".split()
SEASONS = "spring summer autumn winter".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = """
January February March April May June July August September October November December
""".split()
COLOURS = "red blue green yellow white black brown grey orange pink".split()
