// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {Channels} from "../src/Channels.sol";
import {Committee} from "../src/Committee.sol";
import {Disputes} from "../src/Disputes.sol";
import {Jobs} from "../src/Jobs.sol";
import {TestToken} from "../src/TestToken.sol";
import {Vault} from "../src/Vault.sol";
import {Workers} from "../src/Workers.sol";
import {ICommittee} from "../src/interfaces/ICommittee.sol";
import {IJobs} from "../src/interfaces/IJobs.sol";
import {IResolver} from "../src/interfaces/IResolver.sol";
import {Lite} from "./Lite.sol";

/// @dev All five modules, a staked worker, a client with money, and a resolver: `judge` says what the test sets.
abstract contract Court is Lite {
    uint256 internal constant CLIENT = 0xC11E;
    uint256 internal constant WORKER = 0x30B;
    uint256 internal constant MALLORY = 0xBAD;
    uint40 internal constant FOREVER = type(uint40).max;
    uint128 internal constant PURSE = type(uint128).max / 8;
    uint128 internal constant BOND = 100;
    bytes32 internal constant RESULT = keccak256("result");

    Vault internal vault;
    Workers internal workers;
    Channels internal channels;
    Jobs internal jobs;
    Disputes internal disputes;
    Committee internal committee;
    TestToken internal token;
    Judge internal judge;

    function setUp() public virtual {
        vm.warp(1_800_000_000);
        vm.roll(1000);
        vm.prevrandao(keccak256("randao"));
        vault = new Vault(address(this), 0);
        workers = new Workers(vault);
        channels = new Channels(vault, workers);
        jobs = new Jobs(vault, workers);
        disputes = new Disputes(vault, workers, jobs, channels);
        token = new TestToken();
        committee = new Committee(
            vault, jobs, disputes, address(token), ICommittee.Parameters(BOND, 5, 2, 1 days, 12 hours, 14 days)
        );
        judge = new Judge();
        address[] memory modules = new address[](5);
        (modules[0], modules[1], modules[2]) = (address(channels), address(workers), address(jobs));
        (modules[3], modules[4]) = (address(disputes), address(committee));
        vault.seal(modules);
        vault.setToken(address(token), true);
        fund(vm.addr(CLIENT), PURSE);
        fund(address(this), PURSE);
        bytes32 consent = workers.hotKeyDigest(address(this), vm.addr(WORKER), address(0x9999), 0, FOREVER);
        workers.register(vm.addr(WORKER), address(0x9999), FOREVER, signed(WORKER, consent));
        workers.stake(address(token), 1_000_000);
        workers.setExposure(address(token), 1_000_000);
    }

    function fund(address account, uint256 amount) internal {
        token.mint(address(this), amount);
        token.approve(address(vault), amount);
        vault.deposit(address(token), amount, account);
    }

    function quoteOf(uint128 amount, address resolver, uint256 salt) internal view returns (IJobs.Quote memory) {
        return IJobs.Quote({
            specHash: keccak256("spec"),
            client: vm.addr(CLIENT),
            worker: vm.addr(WORKER),
            token: address(token),
            amount: amount,
            penalty: 500,
            validBefore: FOREVER,
            deadline: uint40(block.timestamp + 1 days),
            window: 1 hours,
            resolver: resolver,
            salt: bytes32(salt)
        });
    }

    function submitted(uint128 amount, uint128 claimed, address resolver, uint256 salt)
        internal
        returns (IJobs.Quote memory quote)
    {
        quote = quoteOf(amount, resolver, salt);
        bytes32 id = jobs.jobIdOf(quote);
        jobs.open(quote, signed(WORKER, id), signed(CLIENT, jobs.orderDigest(id)));
        vm.prank(vm.addr(WORKER));
        jobs.submit(quote, RESULT, claimed, "");
    }

    function disputed(uint128 amount, uint128 claimed, address resolver, uint256 salt)
        internal
        returns (IJobs.Quote memory quote)
    {
        quote = submitted(amount, claimed, resolver, salt);
        vm.prank(vm.addr(CLIENT));
        disputes.open(quote, 0);
    }

    function balance(address account) internal view returns (uint256) {
        return vault.balanceOf(address(token), account);
    }

    function locked(address module) internal view returns (uint256) {
        return vault.lockedBy(module, address(token));
    }
}

contract Judge is IResolver {
    Outcome private _answer;
    uint256 public appetite;
    bool public took;

    function say(Outcome answer) external {
        _answer = answer;
    }

    function eat(uint256 gas) external {
        appetite = gas;
    }

    function begin(bytes32, bytes32, bytes32, bytes32) external {
        took = true;
        uint256 start = gasleft();
        while (start - gasleft() < appetite) {}
    }

    function outcome(bytes32) external view returns (Outcome) {
        return _answer;
    }
}
