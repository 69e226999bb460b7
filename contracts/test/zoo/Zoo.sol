// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {ERC20} from "@openzeppelin/contracts/token/ERC20/ERC20.sol";
import {ECDSA} from "@openzeppelin/contracts/utils/cryptography/ECDSA.sol";
import {IVault} from "../../src/interfaces/IVault.sol";

/// @dev Strange tokens and wallets, for tests only. Compiled by build.mjs into tests/contracts/zoo.
contract FeeToken is ERC20("Fee", "FEE") {
    function mint(address to, uint256 amount) external {
        _mint(to, amount);
    }

    /// @dev One tenth of every transfer is burnt.
    function _update(address from, address to, uint256 amount) internal override {
        uint256 fee = from == address(0) ? 0 : amount / 10;
        if (fee > 0) super._update(from, address(0), fee);
        super._update(from, to, amount - fee);
    }
}

/// @dev As the early USDT: transfers return nothing.
contract NoReturnToken {
    mapping(address => uint256) public balanceOf;

    function mint(address to, uint256 amount) external {
        balanceOf[to] += amount;
    }

    function transfer(address to, uint256 amount) external {
        balanceOf[msg.sender] -= amount;
        balanceOf[to] += amount;
    }

    function transferFrom(address from, address to, uint256 amount) external {
        balanceOf[from] -= amount;
        balanceOf[to] += amount;
    }
}

/// @dev Says no by a return value and moves nothing.
contract FalseToken {
    mapping(address => uint256) public balanceOf;

    function transfer(address, uint256) external pure returns (bool) {
        return false;
    }

    function transferFrom(address, address, uint256) external pure returns (bool) {
        return false;
    }
}

/// @dev Calls back into the vault from the middle of a transfer.
contract ReentrantToken is ERC20("Reentrant", "RE") {
    IVault public vault;
    bytes public attack;

    function mint(address to, uint256 amount) external {
        _mint(to, amount);
    }

    function arm(IVault vault_, bytes calldata attack_) external {
        vault = vault_;
        attack = attack_;
    }

    function _update(address from, address to, uint256 amount) internal override {
        super._update(from, to, amount);
        if (attack.length > 0 && from != address(0)) {
            (bool ok, bytes memory why) = address(vault).call(attack);
            if (!ok) {
                assembly {
                    revert(add(why, 0x20), mload(why))
                }
            }
        }
    }
}

/// @dev Balances are shares of a number that anybody can change, as of stETH or AMPL.
contract RebasingToken {
    mapping(address => uint256) private _shares;
    uint256 public percent = 100;

    function rebase(uint256 percent_) external {
        percent = percent_;
    }

    function mint(address to, uint256 amount) external {
        _shares[to] += amount * 100 / percent;
    }

    function balanceOf(address account) external view returns (uint256) {
        return _shares[account] * percent / 100;
    }

    function transfer(address to, uint256 amount) external returns (bool) {
        return _move(msg.sender, to, amount);
    }

    function transferFrom(address from, address to, uint256 amount) external returns (bool) {
        return _move(from, to, amount);
    }

    function _move(address from, address to, uint256 amount) private returns (bool) {
        _shares[from] -= amount * 100 / percent;
        _shares[to] += amount * 100 / percent;
        return true;
    }
}

/// @dev Its issuer can stop all transfers, as of USDC; and it has any number of decimals.
contract PausableToken is ERC20 {
    uint8 private immutable _decimals;
    bool public paused;

    constructor(uint8 decimals_) ERC20("Pausable", "PAUSE") {
        _decimals = decimals_;
    }

    function decimals() public view override returns (uint8) {
        return _decimals;
    }

    function setPaused(bool paused_) external {
        paused = paused_;
    }

    function mint(address to, uint256 amount) external {
        _mint(to, amount);
    }

    function _update(address from, address to, uint256 amount) internal override {
        require(!paused, "paused by its issuer");
        super._update(from, to, amount);
    }
}

/// @dev Has a fallback as WETH has: a permit or an authorization "succeeds" and does nothing.
contract FallbackToken is ERC20("Fallback", "FALL") {
    function mint(address to, uint256 amount) external {
        _mint(to, amount);
    }

    fallback() external payable {}
}

/// @dev ERC-1271 wallet of one key, which can also misbehave.
contract Wallet {
    enum Mood {
        Honest,
        Reverting,
        GasBurner,
        ReturnBomb,
        ShortReturn,
        YesToAll
    }

    address public immutable owner;
    Mood public mood;

    constructor(address owner_) {
        owner = owner_;
    }

    function setMood(Mood mood_) external {
        mood = mood_;
    }

    function isValidSignature(bytes32 digest, bytes calldata signature) external view returns (bytes4) {
        if (mood == Mood.Reverting) revert("no");
        if (mood == Mood.GasBurner) while (true) {}
        if (mood == Mood.ReturnBomb) {
            assembly {
                return(0, 1000000)
            }
        }
        if (mood == Mood.ShortReturn) {
            assembly {
                mstore(0, shl(224, 0x1626ba7e))
                return(0, 4)
            }
        }
        if (mood == Mood.YesToAll) return 0x1626ba7e;
        (address who, ECDSA.RecoverError error_,) = ECDSA.tryRecoverCalldata(digest, signature);
        return error_ == ECDSA.RecoverError.NoError && who == owner ? bytes4(0x1626ba7e) : bytes4(0xffffffff);
    }
}

/// @dev Takes coins by calling back first.
contract Greedy {
    IVault public immutable vault;
    uint256 public rounds;

    constructor(IVault vault_) {
        vault = vault_;
    }

    function deposit() external payable {
        vault.deposit{value: msg.value}(address(0), msg.value, address(this));
    }

    function take(uint256 amount) external {
        vault.withdraw(address(0), amount, address(this));
    }

    receive() external payable {
        if (rounds++ == 0) vault.withdraw(address(0), msg.value, address(this));
    }
}
