"""Word lists of the text-rendering prompts (`ocr.py`): no entry comes twice in its list or has quotation marks."""

STYLES = (
    "a photograph",
    "a realistic close-up",
    "a wide-angle photograph",
    "a film still",
    "an oil painting",
    "a watercolour",
    "a flat vector illustration",
    "a pencil sketch",
    "a 3D render",
    "a vintage postcard",
    "a comic panel",
    "a black and white photograph",
)

PLACES = (
    "on a rainy street at night",
    "in bright morning light",
    "under a clear blue sky",
    "in a narrow alley",
    "beside a quiet harbour",
    "in a crowded market",
    "in front of a brick wall",
    "at the edge of a forest",
    "in a busy railway station",
    "in a small mountain village",
    "on a snowy evening",
    "in a sunlit courtyard",
    "in a cosy living room",
    "near a row of old houses",
    "in thick fog",
    "at golden hour",
    "in a modern airport hall",
    "in a dusty workshop",
    "by a calm lake",
    "among autumn leaves",
    "in a neon-lit arcade",
    "on a wide desert plain",
    "in a school corridor",
    "with a city skyline behind it",
)

LETTERING = (
    "bold capital letters",
    "neat handwriting",
    "rounded white letters",
    "thin modern type",
    "old-fashioned serif type",
    "glowing letters",
    "large painted letters",
    "stencilled letters",
    "golden letters",
    "plain black type",
)

SHOP_SIGNS = (
    "a neon sign",
    "a wooden shop sign",
    "a painted shop window",
    "a striped awning",
    "an illuminated storefront",
    "a hanging metal sign",
    "a delivery van",
    "a paper bag",
)
NOTICE_BOARDS = (
    "a notice board",
    "a warning sign",
    "a paper notice taped to a door",
    "an enamel plate",
    "a plastic sign on a fence",
    "a wooden post",
)
DOORS = ("a glass door", "a small sign in a window", "a chalkboard", "a card on a doorknob", "a ticket booth")
PRICE_TAGS = ("a price tag", "a menu board", "a market stall sign", "a chalkboard menu", "a receipt", "a shelf label")
STREET_SIGNS = ("a street sign", "a brass plate", "a mailbox", "a house wall", "a garden gate", "a moving box")
COVERS = (
    "a book cover",
    "a cinema marquee",
    "a vinyl record sleeve",
    "a theatre poster",
    "a board game box",
    "a magazine cover",
    "the title page of an old book",
)
BANNERS = ("a billboard", "a long banner", "a city bus", "a T-shirt", "a coffee mug", "a hot air balloon", "a mural")
POSTERS = ("a concert poster", "a printed ticket", "a flyer on a lamp post", "a wall calendar", "an invitation card")
PLATES = ("a licence plate", "a departure board", "a train carriage", "a racing car", "a boat hull", "a locker door")
ROAD_SIGNS = ("a road sign", "a wooden signpost", "a milestone", "a trail marker", "a motorway gantry", "a map board")
CARDS = ("a birthday cake", "a greeting card", "a balloon", "a gift tag", "a letter on a desk", "a welcome mat")
CLOTHES = (
    "a baseball cap",
    "a tattoo on a forearm",
    "a hoodie",
    "a woollen scarf",
    "an enamel pin",
    "a silver pendant",
    "a canvas bag",
    "a kite",
)

ADJECTIVES = (
    *("Golden", "Silent", "Little", "Crimson", "Hidden", "Ancient", "Bright", "Wild", "Velvet", "Broken", "Electric"),
    *("Frozen", "Gentle", "Lucky", "Midnight", "Northern", "Old", "Paper", "Quiet", "Rusty", "Salty", "Silver"),
    *("Secret", "Sleepy", "Summer", "Sunny", "Tiny", "Twisted", "Wandering", "Winter", "Wooden", "Lonely"),
)
NOUNS = (
    *("Anchor", "Acorn", "Bridge", "Candle", "Castle", "Compass", "Crow", "Dragon", "Feather", "Forest", "Fox"),
    *("Garden", "Harbour", "Island", "Kettle", "Lantern", "Lighthouse", "Lion", "Mirror", "Moon", "Mountain"),
    *("Orchard", "Owl", "Pearl", "Pepper", "River", "Robot", "Rocket", "Rose", "Shadow", "Spoon", "Storm"),
    *("Swan", "Thistle", "Tiger", "Tower", "Turtle", "Valley", "Violin", "Whale"),
)
SHOPS = (
    *("Bakery", "Books", "Brewery", "Cafe", "Cinema", "Diner", "Florist", "Gallery", "Garage", "Grill", "Hotel"),
    *("Jewellers", "Market", "Museum", "Noodles", "Pharmacy", "Records", "Tailors", "Tea House", "Toys"),
)
TOPICS = ("History", "Return", "Secret", "Song", "Last Days", "Art", "Daughter", "Keeper", "Map", "Theory", "Night")
ORDERS = ("No", "Please Mind", "Beware of", "Caution", "Keep Away From", "Do Not Touch", "Watch Out For", "Danger")
SUBJECTS = (
    *("the Dog", "Wet Paint", "Falling Rocks", "the Step", "Hot Surface", "Thin Ice", "Deep Water", "the Gap"),
    *("High Voltage", "Loose Gravel", "Low Ceiling", "the Machine", "Open Flame", "Slippery Floor", "Wild Bees"),
    *("Moving Doors", "Steep Cliff", "Glass Shelf", "Strong Wind", "Crossing Deer", "Electric Fence"),
)
MORNINGS = ("5:45", "6:00", "6:30", "7:00", "7:15", "7:30", "8:00", "8:30", "9:00", "9:45", "10:00", "10:30", "11:00")
EVENINGS = ("15:00", "16:30", "17:00", "17:45", "18:00", "18:30", "19:15", "20:00", "21:00", "22:30", "23:00")
GOODS = (
    *("Apples", "Bagel", "Blueberry Pie", "Bread", "Burger", "Candles", "Cheese", "Cherry Jam", "Coffee", "Cookies"),
    *("Eggs", "Fish Soup", "Flowers", "Honey", "Ice Cream", "Lemonade", "Milk", "Mushrooms", "Noodles", "Olive Oil"),
    *("Pancakes", "Pears", "Pizza Slice", "Potatoes", "Pumpkin", "Salad", "Soap", "Tea", "Tomatoes", "Waffles"),
)
DOLLARS = tuple(str(number) for number in range(1, 30))
CENTS = ("00", "25", "40", "49", "50", "75", "80", "95", "99")
HOUSE_NUMBERS = tuple(str(number) for number in (*range(1, 100, 3), *range(101, 1000, 37)))
NAMES = (
    *("Alice", "Amara", "Anton", "Bruno", "Carmen", "Chen", "Clara", "Daniel", "Elena", "Emil", "Fatima", "Felix"),
    *("Grace", "Hana", "Hugo", "Ingrid", "Ivan", "Jonas", "Julia", "Kofi", "Laura", "Leon", "Lucia", "Marco"),
    *("Maria", "Martin", "Mei", "Nadia", "Nina", "Noah", "Olga", "Oscar", "Paula", "Ravi", "Rosa", "Samuel"),
    *("Sofia", "Tariq", "Theo", "Victor", "Wanda", "Yara", "Yusuf", "Zoe"),
)
STREETS = ("Street", "Road", "Avenue", "Lane", "Square", "Hill", "Court", "Boulevard", "Terrace", "Way", "Drive")
VERBS = (
    *("Follow", "Find", "Trust", "Build", "Share", "Change", "Love", "Feed", "Protect", "Start", "Write", "Chase"),
    *("Paint", "Celebrate", "Discover", "Free", "Question", "Remember", "Choose", "Imagine"),
)
OWNED = (
    *("Dreams", "Future", "City", "Voice", "Planet", "Heart", "Story", "Path", "Curiosity", "Garden", "Music"),
    *("Morning", "Neighbours", "Own Road", "Mind", "Coffee", "Moment", "Courage", "Roots", "Next Step"),
)
EVENTS = (
    *("Jazz Night", "Book Fair", "Spring Concert", "Chess Open", "Film Festival", "Flea Market", "Harvest Feast"),
    *("Marathon", "Open Day", "Opera Gala", "Poetry Slam", "Robot Expo", "Science Fair", "Summer Camp", "Tea Party"),
)
MONTHS = (
    *("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November"),
    "December",
)
DAYS = tuple(str(number) for number in range(1, 29))
LETTERS = tuple(first + second for first in "ABCDEFHKLMNPRSTX" for second in "ACEHKMNRTX")
NUMBERS = tuple(str(number) for number in range(101, 1000, 7))
DISTANCES = tuple(str(number) for number in (*range(2, 30), *range(35, 400, 15)))
UNITS = ("km", "Miles", "Minutes")
GREETINGS = (
    *("Happy Birthday", "Welcome Home", "Thank You", "Good Luck", "Congratulations", "Get Well Soon", "Well Done"),
    *("Merry Christmas", "Miss You", "With Love From", "Best Wishes", "Bon Voyage", "See You Soon", "Hello"),
)
SINGLE_WORDS = (
    *("Adventure", "Balance", "Believe", "Bravery", "Breathe", "Champion", "Chaos", "Courage", "Curious", "Destiny"),
    *("Dreamer", "Echo", "Explore", "Fearless", "Forever", "Freedom", "Gravity", "Harmony", "Hope", "Horizon"),
    *("Infinity", "Journey", "Kindness", "Legend", "Liberty", "Lucky", "Magic", "Momentum", "Mystery", "Nomad"),
    *("Ocean", "Onward", "Patience", "Phoenix", "Radiant", "Rebel", "Relax", "Resilience", "Serenity", "Silence"),
    *("Solstice", "Spirit", "Stardust", "Strength", "Sunshine", "Thunder", "Together", "Traveller", "Wander", "Wonder"),
)
